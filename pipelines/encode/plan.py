"""What is to be done: shards of clips, against what the output folder already holds of them."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipelines import schema
from pipelines.curation import commits
from pipelines.curation.commits import Commit
from pipelines.curation.ledger import WORK_FOLDER
from pipelines.damaged import set_aside
from pipelines.encode.config import EncodeError
from pipelines.encode.model import EncoderChoice
from pipelines.overrides import differences
from pipelines.schema import ShardError
from pipelines.shards import read_record, sha256_file, write_atomic

SETTINGS_FILE = "encode.json"
_FORMAT = 1
_READERS = 8
_MAX_LISTED = 12


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The shards of clips by what is to be done with them, each in order.

    done: encoded from this very source with these settings.
    new: not encoded, or not wholly there.
    changed: encoded from another content of the source.
    failed: encoded, but some of their clips failed; the source is unchanged.
    """

    done: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)

    def todo(self, *, retry_failed: bool, limit: int | None) -> tuple[str, ...]:
        """The shards to encode now, in order."""
        names = [*self.new, *self.changed, *(self.failed if retry_failed else ())]
        names.sort(key=schema.shard_index)
        return tuple(names[:limit])


def check_folders(source: Path, out: Path) -> None:
    """Refuse folders that cannot be read from and written to.

    Raises:
        EncodeError: `source` holds no shards of clips, or `out` holds other things.
    """
    if not source.is_dir():
        raise EncodeError(f"{source} is no folder: give the one that `animator curate` wrote.")
    if source.resolve() == out.resolve():
        raise EncodeError(
            f"{out} is the folder of the clips themselves: give another --out for their latents."
        )
    names = shard_names(source)
    if not names:
        raise EncodeError(
            f"{source} holds no committed shards: give the folder that `animator curate` wrote."
        )
    # One that can be read speaks for all; the others are looked at when their turn comes.
    for name in names:
        with suppress(ShardError, OSError):
            kind = read_record(source / f"{name}.json").kind
            if kind != "clips":
                raise EncodeError(
                    f"{source} holds shards of {kind}, expected clips: give the folder that "
                    "`animator curate` wrote."
                )
            break
    if not (out / SETTINGS_FILE).exists() and any(out.glob("shard-*")):
        raise EncodeError(
            f"{out} holds shards that `animator encode` did not make: give another --out folder."
        )


def check_settings(out: Path, choice: EncoderChoice) -> None:
    """Compare the settings with those that the folder keeps, if it keeps some.

    Raises:
        EncodeError: they differ; the message lists what does.
    """
    path = out / SETTINGS_FILE
    if not path.exists():
        return
    before = schema.decode_json(path.read_bytes(), str(path))
    changes = differences(before, schema.decode_json(_settings(choice), "these settings"))
    if changes:
        listed = "\n  ".join(changes[:_MAX_LISTED])
        raise EncodeError(
            f"{out} was begun with other settings or another model:\n  {listed}\n"
            "Give the same ones to go on with it, or another --out folder."
        )


def write_settings(out: Path, choice: EncoderChoice) -> None:
    """Keep the settings in the folder, unless it has them."""
    if not (out / SETTINGS_FILE).exists():
        write_atomic(out / SETTINGS_FILE, _settings(choice))


def _settings(choice: EncoderChoice) -> bytes:
    return schema.encode_json({"format": _FORMAT, **choice.settings()}, digits=17)


def survey(source: Path, out: Path, choice: EncoderChoice) -> Survey:
    """Look which shards of `source` are encoded in `out`.

    An output shard is done when its record parses, its settings are these, it was made from what
    the source shard's record says now, and its tar has the recorded size and is not newer than its
    record (else its SHA-256 decides).

    Raises:
        EncodeError: `out` holds a shard that `source` does not have.
        RunError: a record or a tar is there and cannot be read.
    """
    sources = {name: _identity(commit) for name, commit in _commits(source, shard_names(source))}
    held = shard_names(out)
    if orphans := sorted(set(held) - sources.keys()):
        raise EncodeError(
            f"{out} holds {orphans[0]}{f' and {len(orphans) - 1} more' * (len(orphans) > 1)}, "
            f"which {source} does not have: give the folder they were made from, another --out, "
            "or delete them."
        )
    states: dict[str, list[str]] = {"done": [], "new": [], "changed": [], "failed": []}
    made = dict(_commits(out, held))
    for name in sorted(sources, key=schema.shard_index):
        states[_state(out, made.get(name), sources[name], choice.config_hash)].append(name)
    return Survey(**{state: tuple(names) for state, names in states.items()}, sources=sources)


def clean_up(out: Path, seen: Survey) -> None:
    """Remove what dead attempts left: work folders and tars without a record.

    Damaged shards are moved into OUT/damaged/.
    """
    shutil.rmtree(out / WORK_FOLDER, ignore_errors=True)
    for path in out.glob(".*.tmp"):
        path.unlink(missing_ok=True)
    whole = {*seen.done, *seen.changed, *seen.failed}
    found = {path.stem for suffix in ("json", "tar") for path in out.glob(f"shard-*.{suffix}")}
    for name in sorted(found - whole):
        set_aside(out, name)


def shard_names(folder: Path) -> list[str]:
    """The names of the shards with a record, in order; an empty list where there is no folder."""
    names = []
    for path in folder.glob("shard-*.json"):
        with suppress(ShardError):
            schema.shard_index(path.stem)
            names.append(path.stem)
    return sorted(names, key=schema.shard_index)


def source_id(tar_sha256: str) -> str:
    """By what an output shard knows the content of the shard it was made from."""
    return tar_sha256[:16] or "unreadable"


def _identity(commit: Commit | None) -> str:
    return source_id(commit.tar_sha256 if commit is not None else "")


def _state(out: Path, commit: Commit | None, source: str, config_hash: str) -> str:
    if commit is None or commit.config_hash != config_hash or not _is_whole(out, commit):
        return "new"
    if commit.rows != commits.hash_rows([source]):
        return "changed"
    return "failed" if commit.failed else "done"


def _is_whole(folder: Path, commit: Commit) -> bool:
    """Whether a tar is the one of its record; its bytes are read only where it looks touched."""
    tar = folder / f"{commit.name}.tar"
    try:
        stat = tar.stat()
        if stat.st_size != commit.tar_bytes:
            return False
        return stat.st_mtime_ns <= commit.json_mtime_ns or sha256_file(tar) == commit.tar_sha256
    except FileNotFoundError:
        return False
    except OSError as error:
        raise commits.unreadable(tar, error) from None


def _commits(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, Commit | None]]:
    """What the records of these shards say in short; None for one that is damaged."""
    cached, _ = commits.read_cache(folder)

    def read(name: str) -> Commit | None:
        known = cached.get(name)
        with suppress(OSError):
            if known is not None and known.is_of((folder / f"{name}.json").stat()):
                return known
        return commits.read_commit(folder, name)

    # Threads hide the latency of a shared file system.
    with ThreadPoolExecutor(max_workers=_READERS) as pool:
        yield from zip(names, pool.map(read, names), strict=True)
