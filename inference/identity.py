"""How alike the face of a video is to the reference's, frame by frame, while it is written.

Shapes: T frames, H W pixels, E face embedding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

MOST_FRAMES = 256  # that faces are looked for in at most, spread evenly over the video
LIMIT = 0.2  # of cosine similarity, that a window may lose against the first one
STRANGER = 0.2  # cosine of a recognition network's embeddings, below which it is somebody else
# Embeddings (E,) of the faces of a frame, of any length.
Identify = Callable[[np.ndarray], Sequence[np.ndarray]]


class IdentityMeter:
    """Measures the face that is most like the reference's in the frames of a video, in order.

    Args:
        num_frames: of the video.
        windows: the frames of each window of the last step, for the drift from one to the next.
        identify: embeds the faces of a frame.
        reference: the embedding that the faces should have, `(E,)`.
        measured_by: what embeds, for the record.
        recognises: whether that tells people apart, so that a face can be somebody else's.
    """

    def __init__(
        self,
        num_frames: int,
        windows: Sequence[Sequence[int]],
        identify: Identify,
        reference: np.ndarray,
        *,
        measured_by: str,
        recognises: bool,
    ):
        self.every = max(1, -(-num_frames // MOST_FRAMES))
        self._windows = windows
        self._identify = identify
        self._reference = reference
        self._measured_by = measured_by
        self._recognises = recognises
        self._similarity: list[float | None] = []
        self._seen = 0

    def add(self, frame: np.ndarray) -> None:
        """Look at the next frame, uint8 RGB `(H, W, 3)`."""
        if self._seen % self.every == 0:
            found = [_cosine(face, self._reference) for face in self._identify(frame)]
            self._similarity.append(max(found, default=None))
        self._seen += 1

    def record(self) -> dict[str, Any]:
        """For the JSON beside a video.

        `similarity` is the cosine of frames 0, `every`, 2 `every`, …, None where no face was found;
        `mean` and `lowest` are of the others; `windows`, of a video of several, has the mean of the
        first, the last and the worst window that shows a face.
        """
        known = self._known
        record: dict[str, Any] = {
            "measured_by": self._measured_by,
            "mean": round(float(np.mean(known)), 4) if known else None,
            "lowest": round(min(known), 4) if known else None,
            "every": self.every,
            "similarity": [v if v is None else round(v, 4) for v in self._similarity],
        }
        means = self._window_means()
        if len(self._windows) > 1 and means:
            ends = {"first": means[0], "last": means[-1], "lowest": min(means)}
            record["windows"] = {name: round(value, 4) for name, value in ends.items()}
        return record

    def warnings(self) -> list[str]:
        """What is worth saying of the video, for its record."""
        known, means = self._known, self._window_means()
        if not known:
            return [
                f"no face was found in the {len(self._similarity)} frames of the video that were "
                "looked at, while the reference has one"
            ]
        warnings = []
        if self._recognises and np.mean(known) < STRANGER:
            warnings.append(
                f"the face is hardly the reference's: mean similarity {np.mean(known):.2f} by "
                f"{self._measured_by}, expected {STRANGER} at least of the same person"
            )
        if len(means) > 1 and means[0] - min(means) > LIMIT:
            warnings.append(
                f"the face drifts from the reference: similarity {means[0]:.2f} in the first "
                f"window, {min(means):.2f} in the worst"
            )
        return warnings

    @property
    def _known(self) -> list[float]:
        return [value for value in self._similarity if value is not None]

    def _window_means(self) -> list[float]:
        """Mean similarity of each window that shows a face, in order."""
        found = []
        for span in self._windows:
            chosen = [frame // self.every for frame in span if frame % self.every == 0]
            known = [v for i in chosen if (v := self._similarity[i]) is not None]
            if known:
                found.append(float(np.mean(known)))
        return found


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    length = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / length if length > 0 else 0.0
