"""How fast poses are aligned, beside the closed form, on one core."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from animator.alignment_weights import AUTO, open_alignment
from animator.keypoints import NUM_KEYPOINTS
from inference.clip_alignment import AlignmentSettings, align_clip, align_frames, sum_frames
from inference.timing import OnRun, alternate, machine, summary

BASELINE = "closed_form"


@dataclass(frozen=True, kw_only=True)
class AlignmentBench:
    """What is timed: a clip of this many frames, this often."""

    frames: int = 1000
    repeats: int = 5
    alignment: str = AUTO

    def __post_init__(self) -> None:
        for name in ("frames", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"Got {name} {getattr(self, name)}, but expected at least 1.")


def bench_alignment(config: AlignmentBench, on_run: OnRun | None = None) -> dict[str, Any]:
    """Seconds to find a clip's transform, by the closed form and by the block, on one thread.

    Returns:
        `rows` (seconds, ratio to the closed form of the same round, milliseconds a frame), the
        machine and the settings.

    Raises:
        WeightsError: for an alignment that cannot be opened.
    """
    block, about = open_alignment(config.alignment)
    generator = torch.Generator().manual_seed(0)
    driven = 0.2 * torch.randn(1, config.frames, NUM_KEYPOINTS, 2, generator=generator)
    reference = 0.2 * torch.randn(1, NUM_KEYPOINTS, 2, generator=generator)
    weight = (torch.rand(1, config.frames, NUM_KEYPOINTS, generator=generator) > 0.1).float()
    frame = torch.ones(1, 2)

    def align(with_block: bool) -> None:
        found = align_frames(block if with_block else None, reference, driven, weight, frame)
        align_clip(sum_frames(found, driven, weight), AlignmentSettings())

    calls = {BASELINE: lambda: align(False)}
    if block is not None:
        calls["learned"] = lambda: align(True)
    total, done = len(calls) * config.repeats, 0

    def tell() -> None:
        nonlocal done
        done += 1
        if on_run is not None:
            on_run(done, total)

    device = torch.device("cpu")
    with _one_thread():
        for call in calls.values():
            call()  # what libraries prepare in their first call is not it
        seconds = alternate(calls, config.repeats, device, tell)
        on = machine(device)
    rows = {name: summary(times, seconds[BASELINE]) for name, times in seconds.items()}
    for row in rows.values():
        row["ms_per_frame"] = round(1e3 * row["seconds"] / config.frames, 4)
    return {
        "bench": "alignment",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": on,
        "settings": asdict(config),
        "alignment": about,
        "baseline": BASELINE,
        "rows": rows,
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
