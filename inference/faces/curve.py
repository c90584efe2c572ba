"""What face optimisation did, step by step: the loss of every iteration, and seconds."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any


class FaceCurve:
    """Sums over the portions of a clip that a step works through."""

    def __init__(self) -> None:
        self._loss: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        self._faces: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        self._seconds: dict[int, float] = defaultdict(float)
        self._begin: dict[int, list[float]] = defaultdict(lambda: [0.0, 0])
        self._end = [0.0, 0]

    def add(self, step: int, iteration: int, measured: Sequence[tuple[float, int]]) -> None:
        """Sums of losses and numbers of faces of an iteration, before its update."""
        self._loss[step][iteration] += sum(loss for loss, _ in measured)
        self._faces[step][iteration] += sum(faces for _, faces in measured)

    def begin(self, step: int, measured: Sequence[tuple[float, int]]) -> None:
        """The same of every chunk of a portion, each before its first update."""
        self._begin[step][0] += sum(loss for loss, _ in measured)
        self._begin[step][1] += sum(faces for _, faces in measured)

    def end(self, loss: float, faces: int) -> None:
        """The same after the last update of all."""
        self._end[0] += loss
        self._end[1] += faces

    def took(self, step: int, seconds: float) -> None:
        """Time of a call; portions of a step add up."""
        self._seconds[step] += seconds

    def state(self) -> list[Any]:
        """For JSON, to be read by `of_state`."""
        rows = [
            [step, i, loss, self._faces[step][i]]
            for step, losses in self._loss.items()
            for i, loss in losses.items()
        ]
        return [rows, list(self._seconds.items()), self._end, list(self._begin.items())]

    @classmethod
    def of_state(cls, state: list[Any]) -> "FaceCurve":
        """What `state` gave."""
        curve = cls()
        rows, seconds, curve._end, begun = state
        curve._begin.update(begun)
        for step, i, loss, faces in rows:
            curve.add(step, i, [(loss, faces)])
        for step, own in seconds:
            curve.took(step, own)
        return curve

    def record(self) -> dict[str, Any]:
        """Losses by step and iteration, similarities at the begin and at the end, seconds.

        The mean loss of an iteration is over the faces that it measured, None where there was no
        number: where a portion stopped early, the later iterations are those of the others.
        """
        steps = []
        for step, losses in sorted(self._loss.items()):
            faces = self._faces[step]
            steps.append(
                {
                    "step": step,
                    "loss": [
                        round(losses[i] / faces[i], 5) if faces[i] else None for i in sorted(losses)
                    ],
                    "faces": int(self._begin[step][1]),
                    "seconds": round(self._seconds[step], 3),
                }
            )
        record: dict[str, Any] = {
            "steps": steps,
            "seconds": round(sum(self._seconds.values()), 3),
        }
        loss, faces = self._begin[steps[0]["step"]] if steps else (0.0, 0)
        if faces:
            record["similarity_first"] = round(1 - loss / faces, 4)
        if self._end[1]:
            record["similarity_last"] = round(1 - self._end[0] / self._end[1], 4)
        return record
