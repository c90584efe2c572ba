"""What the records of committed shards say in short, cached so that a start need not read them all.

`commits.jsonl` has a line a shard and can be lost at any time: lines are believed only while the
record they are of has the size and the time they name, and whatever is missing is read again.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from pipelines import schema
from pipelines.ray_sizes import RunError
from pipelines.shards import write_atomic

COMMITS_FILE = "commits.jsonl"


@dataclass(frozen=True, kw_only=True)
class Commit:
    """One committed shard in short.

    kept, rejected, failed: sources; clips: kept; not_stored: clips that have no members.
    rows: `hash_rows` of its sources' ids.
    tar_checked_ns: the time of a tar younger than the record whose SHA-256 was found right.
    """

    name: str
    json_bytes: int
    json_mtime_ns: int
    config_hash: str
    tar_sha256: str
    tar_bytes: int
    kept: int
    rejected: int
    failed: int
    clips: int
    not_stored: int
    rows: str
    tar_checked_ns: int = 0

    def is_of(self, stat: os.stat_result) -> bool:
        """Whether the record is still the one that was read."""
        return (self.json_bytes, self.json_mtime_ns) == (stat.st_size, stat.st_mtime_ns)


def hash_rows(ids: Iterable[str]) -> str:
    """A hash of the ids of a shard's sources, in order."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:32]


def read_commit(folder: Path, name: str) -> Commit | None:
    """What the record of a shard says; None where there is none or it is damaged.

    Raises:
        RunError: it cannot be read just now, so nobody knows what it says.
    """
    path = folder / f"{name}.json"
    try:
        with path.open("rb") as stream:
            stat = os.fstat(stream.fileno())
            if stat.st_size > schema.MAX_RECORD_BYTES:
                return None
            record = schema.decode_json(stream.read(), path.name, schema.MAX_RECORD_BYTES)
        if (record["name"], record["format"]) != (name, schema.FORMAT):
            return None
        sources = record["sources"]
        verdicts = [source["verdict"] for source in sources]
        clips = [clip for source in sources for clip in source["clips"]]
        return Commit(
            name=name,
            json_bytes=stat.st_size,
            json_mtime_ns=stat.st_mtime_ns,
            config_hash=str(record["config_hash"]),
            tar_sha256=str(record["tar_sha256"]),
            tar_bytes=int(record["tar_bytes"]),
            kept=verdicts.count("kept"),
            rejected=verdicts.count("rejected"),
            failed=verdicts.count("failed"),
            clips=sum(clip["verdict"] == "kept" for clip in clips),
            # Of a copy whose original is gone, the source says so and has no clips.
            not_stored=sum("not_stored" in one["reasons"] for one in [*clips, *sources]),
            rows=hash_rows(source["id"] for source in sources),
        )
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(path, error) from None
    # Damage can leave JSON of any shape.
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def unreadable(path: Path, error: OSError) -> RunError:
    """A file of a shard that is there and cannot be read: no reason to make the shard anew."""
    reason = error.strerror or str(error)
    return RunError(f"{path} cannot be read ({reason}): mend that, then run again.")


def read_cache(folder: Path) -> tuple[dict[str, Commit], bool]:
    """The cached commits by name, and whether every line of the cache was one of them."""
    try:
        lines = (folder / COMMITS_FILE).read_bytes().splitlines()
    except OSError:
        return {}, True
    found: dict[str, Commit] = {}
    for line in lines:
        try:
            commit = Commit(**json.loads(line))
        # A line cut off by a death, or of another version.
        except (ValueError, TypeError):
            continue
        found[commit.name] = commit
    return found, len(found) == len(lines)


def write_cache(folder: Path, entries: Iterable[Commit]) -> None:
    """Write the cache anew, sorted."""
    lines = [_line(commit) for commit in sorted(entries, key=lambda commit: commit.name)]
    write_atomic(folder / COMMITS_FILE, "".join(lines).encode("ascii"))


def _line(commit: Commit) -> str:
    return json.dumps(asdict(commit), separators=(",", ":")) + "\n"
