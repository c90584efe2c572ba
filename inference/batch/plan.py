"""In which order a batch is worked through: neighbours share what an engine computes once.

Items of one shape lie together, so that nothing is compiled or measured out twice; among them those
of one driving clip, whose poses are the dearest thing that items share, and of one reference. The
order changes no output.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from inference.batch.config import BatchConfig, model_defaults
from inference.batch.manifest import ManifestItem
from inference.batch.task import Task
from pipelines.video import VideoError, probe

# An engine gets so many chunks at least, so that none is busy long after the others.
CHUNKS_AN_ENGINE = 4
MOST_IN_CHUNK = 32
READERS = 8


def make_tasks(
    items: Sequence[ManifestItem], config: BatchConfig, settings: str, run: str
) -> list[Task]:
    """A task for each item.

    Args:
        settings: what decides outputs besides the items themselves.
        run: a name for this run of the batch.
    """
    return [
        Task(
            id=item.id,
            identity=item.identity(settings),
            request={
                **item.request(config.out / item.output).to_json(),
                "reference": str(item.reference.absolute()),
                "driving": str(item.driving.absolute()),
            },
            shape=_shape(item, config),
            run=run,
            shares=(item.digests["driving"], item.digests["reference"]),
        )
        for item in items
    ]


def measure(
    tasks: Sequence[Task], config: BatchConfig, tell: Callable[[int, int], None]
) -> list[Task]:
    """The tasks with the frames of their clips and what they will cost.

    A clip that cannot be read costs nothing: its items fail at once.

    Args:
        tell: called with how many clips are read, of how many.
    """
    clips = sorted({task.request["driving"] for task in tasks})
    frames: dict[str, int] = {}
    with ThreadPoolExecutor(READERS) as readers:
        for clip, count in zip(clips, readers.map(_num_frames, clips), strict=True):
            frames[clip] = count
            tell(len(frames), len(clips))
    (height, width), steps = model_defaults(config)
    measured = []
    for task in tasks:
        count = frames[task.request["driving"]]
        size = task.shape.get("size") or (height, width)
        share = size[0] * size[1] / (height * width) * (task.request["steps"] or steps) / steps
        measured.append(replace(task, frames=count, work=round(count * share, 3)))
    return measured


def chunks(tasks: Iterable[Task], engines: int) -> list[list[Task]]:
    """The tasks in the order of work, in the portions that one engine takes.

    What cannot be read comes first, so that it is known soon; then the longest clips, so that the
    last items to finish are short ones.
    """
    ordered = sorted(tasks, key=_place)
    most = math.ceil(len(ordered) / (engines * CHUNKS_AN_ENGINE))
    most = max(1, min(MOST_IN_CHUNK, most))
    portions = []
    for _, group in groupby(ordered, key=lambda task: _place(task)[:-2]):
        alike = list(group)
        portions += [alike[begin : begin + most] for begin in range(0, len(alike), most)]
    return portions


def _place(task: Task) -> tuple[Any, ...]:
    driving, reference = task.shares
    shape = (str(task.shape.get("size", "")), str(task.shape.get("framing", "")))
    return (task.frames > 0, shape, -task.frames, driving, reference, task.id)


def _shape(item: ManifestItem, config: BatchConfig) -> dict[str, Any]:
    size, framing = item.size or config.size, item.framing or config.framing
    shape: dict[str, Any] = {} if size is None else {"size": size}
    shape |= {} if framing == "pad" else {"framing": framing}
    return shape if config.align else shape | {"align": False}


def _num_frames(clip: str) -> int:
    try:
        return probe(Path(clip)).num_frames
    except (VideoError, OSError):
        return 0
