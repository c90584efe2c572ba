"""How long a run of a million sources takes to plan, and to go on with, and in how much memory.

A manifest of made-up addresses and made-up committed shards are written into a folder; each step
is then timed in a process of its own, whose peak memory is its own too.
"""

import hashlib
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipelines import schema
from pipelines.curation.commits import COMMITS_FILE
from pipelines.curation.config import CurationConfig
from pipelines.curation.ledger import scan_done
from pipelines.curation.plan import Plan, load_plan, make_plan, save_plan
from pipelines.curation.sources import read_sources

_EMPTY_TAR = b"\0" * 1024
_FORMATS = ("csv", "parquet")


def measure_planning(
    num_sources: int = 1_000_000,
    num_committed: int = 30_000,
    *,
    clip_values: int = 40,
    folder: Path | None = None,
    progress: Callable[[str], Any] | None = None,
) -> dict[str, Any]:
    """Time planning from a CSV and a Parquet manifest, and two starts of a run that is under way.

    Args:
        num_committed: shards that are done; fewer where the plan has fewer.
        clip_values: numbers in each clip's series, by which the size of the records is set.
        folder: where to work, on the disk to be measured; by default a temporary one.

    Returns:
        `sources`, `shards_committed`, `record_bytes` (mean), and for each of `plan_csv`,
        `plan_parquet`, `resume_first` (every record is read) and `resume` (from the cache)
        `seconds` and `peak_bytes` of its process.
    """
    tell = progress or (lambda text: None)
    with tempfile.TemporaryDirectory(dir=folder, prefix="plan-benchmark-") as name:
        root = Path(name)
        tell(f"writing manifests of {num_sources} rows")
        _write_manifests(root, num_sources)
        found: dict[str, Any] = {"sources": num_sources}
        for kind in _FORMATS:
            tell(f"planning from {kind}")
            shutil.rmtree(root / "out", ignore_errors=True)
            found[f"plan_{kind}"] = _timed("plan", root / f"sources.{kind}", root / "out")
        plan = load_plan(root / "out")
        count = min(num_committed, plan.num_shards)
        tell(f"writing {count} committed shards")
        num_bytes = _write_shards(root / "out", plan, count, clip_values)
        found |= {"shards_committed": count, "record_bytes": round(num_bytes / count)}
        (root / "out" / COMMITS_FILE).unlink(missing_ok=True)
        for step in ("resume_first", "resume"):
            tell(step.replace("_", " "))
            found[step] = _timed("resume", root / "sources.csv", root / "out")
            if found[step].pop("done") != count:
                raise RuntimeError(f"expected {count} shards to be found done")
    return found


def _timed(step: str, manifest: Path, out: Path) -> dict[str, Any]:
    """Seconds and peak memory of one step in a fresh process, its start included."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.curation.plan_benchmark", step, manifest, out],
        check=True,
        stdout=subprocess.PIPE,
    )
    seconds = round(time.monotonic() - began, 2)
    return {"seconds": seconds, **json.loads(done.stdout)}


def _step(step: str, manifest: Path, out: Path) -> None:
    """What `animator curate` does before its first and before a later start of work."""
    plan = make_plan(read_sources([str(manifest)]), CurationConfig())
    out.mkdir(exist_ok=True)
    plan = save_plan(out, plan)
    result: dict[str, Any] = {}
    if step == "resume":
        result["done"] = len(scan_done(out, plan).names)
    result["peak_bytes"] = _peak_bytes()
    print(json.dumps(result))


def _peak_bytes() -> int:
    """The most memory this process held, since it became this program.

    Linux's `ru_maxrss` is handed on through `exec`: it would count what our parent held.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10  # in kB, but on macOS in bytes


def _write_manifests(root: Path, count: int) -> None:
    draw = random.Random(0)
    table = pa.table(
        {
            "url": [
                f"https://cdn{draw.randrange(50)}.example.org/videos/{draw.getrandbits(96):024x}.mp4"
                for _ in range(count)
            ],
            "license": ["CC-BY-4.0"] * count,
            "uploader": [f"channel {number % 1000}" for number in range(count)],
            "title": [f"A dance, the {number}th of them" for number in range(count)],
        }
    )
    pyarrow.csv.write_csv(table, root / "sources.csv")
    pq.write_table(table, root / "sources.parquet")


def _write_shards(out: Path, plan: Plan, count: int, clip_values: int) -> int:
    """Write the first shards as if they were done, not flushed to the disk; returns their bytes."""
    # Encoded once and filled in: the records of a million sources would take minutes to encode.
    source = schema.encode_record(_record("SOURCE_ID", "SOURCE_URI", clip_values)).decode()
    num_bytes = 0
    for index in range(count):
        name = plan.shard(index).name
        texts = [
            source.replace("SOURCE_ID", row.id).replace("SOURCE_URI", row.uri)
            for row in plan.shard_rows(index)
        ]
        record = schema.ShardRecord(
            name=name,
            config_hash=plan.config_hash,
            tar_sha256=hashlib.sha256(_EMPTY_TAR).hexdigest(),
            tar_bytes=len(_EMPTY_TAR),
            members={},
            counts={},
        )
        head = schema.encode_record(record).decode()
        data = head.replace('"sources":[]', f'"sources":[{",".join(texts)}]').encode()
        num_bytes += len(data)
        (out / f"{name}.tar").write_bytes(_EMPTY_TAR)
        (out / f"{name}.json").write_bytes(data)
    return num_bytes


def _record(source: str, uri: str, clip_values: int) -> schema.SourceRecord:
    """A source with one clip, of the size that records have."""
    draw = random.Random(0)
    clip = schema.ClipRecord(
        key=f"{source}_000",
        start=0.0,
        end=10.0,
        verdict="rejected",
        reasons=("moving_camera",),
        scores={f"score_{number}": draw.random() for number in range(20)},
        series={"face_score": [round(draw.random(), 3) for _ in range(clip_values)]},
        signature=f"{draw.getrandbits(64):016x}" * 8,
    )
    return schema.SourceRecord(
        id=source,
        sha256=f"{draw.getrandbits(256):064x}",
        bytes=10**7,
        uris=(uri,),
        verdict="rejected",
        reasons=clip.reasons,
        scores=clip.scores,
        clips=(clip,),
    )


if __name__ == "__main__":
    _step(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
