"""How long each stage took: a line a source in `timings.jsonl`, kept apart from the records.

Records depend on the sources and the settings alone; times never do.
"""

import heapq
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

TIMINGS_FILE = "timings.jsonl"
_SLOWEST = 10


def append_timings(folder: Path, seconds_of: Iterable[tuple[str, Mapping[str, float]]]) -> None:
    """Add the stage times of sources (id, seconds by stage)."""
    lines = [
        json.dumps({"source": source, "seconds": {k: round(v, 4) for k, v in seconds.items()}})
        for source, seconds in seconds_of
        if seconds
    ]
    if lines:
        with (folder / TIMINGS_FILE).open("a") as stream:
            stream.write("\n".join(lines) + "\n")


def iter_timings(folder: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Every line that is whole; a run that died may have left a part of one."""
    path = folder / TIMINGS_FILE
    if not path.is_file():
        return
    with path.open() as stream:
        for line in stream:
            try:
                entry = json.loads(line)
                yield str(entry["source"]), {k: float(v) for k, v in entry["seconds"].items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                continue


def read_timings(folder: Path) -> dict[str, Any]:
    """Seconds and share of each stage, most first, and the sources that took longest.

    A source that was worked on twice counts twice: this is what the run cost.
    """
    stages: dict[str, float] = defaultdict(float)
    slowest: list[tuple[float, str, str]] = []
    count = 0
    for source, seconds in iter_timings(folder):
        count += 1
        total = sum(seconds.values())
        for stage, spent in seconds.items():
            stages[stage] += spent
        worst = max(seconds, key=lambda name: seconds[name], default="")
        push = heapq.heappush if len(slowest) < _SLOWEST else heapq.heappushpop
        push(slowest, (total, source, worst))
    whole = sum(stages.values())
    return {
        "sources": count,
        "seconds": round(whole, 2),
        "stages": [
            {"stage": stage, "seconds": round(spent, 2), "share": round(spent / whole, 4)}
            for stage, spent in sorted(stages.items(), key=lambda item: -item[1])
            if whole > 0
        ],
        "slowest": [
            {"source": source, "seconds": round(total, 2), "stage": stage}
            for total, source, stage in sorted(slowest, reverse=True)
        ],
    }
