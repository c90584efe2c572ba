"""Which sources and clips of a run repeat earlier ones, decided over all shards in plan order.

Sources: of those with the same bytes that did not fail, the first stands and the others are copies
of it, without clips. Clips: one that passes its own rules and whose signature differs from that of
an earlier clip by at most `duplicates.max_distance` repeats it, provided that the earlier one
passes its rules too and repeats nothing itself; of several such, it repeats the first. Clips of one
source never repeat each other: they show other moments, and a camera that stands still makes them
all alike. A clip that passes but was never stored counts as if it were, so decisions do not depend
on what is stored.

Of each clip some 250 bytes are held in memory, whatever its record's size.
"""

import hashlib
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import schema
from pipelines.curation.config import DuplicateConfig
from pipelines.curation.filters import REASONS
from pipelines.curation.outcomes import DUPLICATE, NOT_STORED, ClipRuling, SourceRuling
from pipelines.curation.signature import HASH_BITS, NUM_FRAMES
from pipelines.schema import ShardError

Judge = Callable[[dict[str, Any]], Iterable[str]]
Tell = Callable[[int, int], Any]

_BIT = {reason: 1 << number for number, reason in enumerate(REASONS)}
_SIGNATURE_BYTES = NUM_FRAMES * HASH_BITS // 8
_HASHES = struct.Struct(f">{NUM_FRAMES}Q")
_SHA_BYTES = 32
# What a record says of a source, and of a clip.
_FAILED, _WORKED, _COPY, _UNTIDY_COPY = range(4)
_KEPT, _REJECTED, _REPEATS, _MISSING = range(4)


class RunTable:
    """What is decided of a run from: its sources and clips as columns of numbers.

    Args:
        folder: of the shards.
        names: of the shards, in plan order.
        judge: the reasons that a clip's own scores give to reject it, from its plain record.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        judge: Judge,
        tell: Tell = lambda done, total: None,
    ) -> None:
        self.names = names
        self._ids, self._keys = _TextColumn(), _TextColumn()
        self._sha, self._words = bytearray(), [array("Q") for _ in range(NUM_FRAMES)]
        self._states, self._noted_originals = array("B"), array("Q")
        self._outcomes, self._noted_firsts = array("B"), array("Q")
        self._reasons, self._stored = array("I"), array("B")
        self._source_starts, self._clip_starts = array("Q", [0]), array("Q", [0])
        for done, name in enumerate(names):
            tell(done, len(names))
            path = folder / f"{name}.json"
            record = schema.decode_json(path.read_bytes(), path.name, schema.MAX_RECORD_BYTES)
            try:
                self._add(record, judge)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise ShardError(f"{path.name} is not a shard record: {error!r}") from None
        self.originals = np.full(len(self._states), -1, np.int64)
        self.orphans = np.zeros(len(self._states), bool)
        self.firsts = np.full(len(self._outcomes), -1, np.int64)

    def decide(self, config: DuplicateConfig, tell: Tell = lambda done, total: None) -> None:
        """Find the copies among the sources, and the repeats among the clips; once."""
        self._find_copies()
        self._sha = bytearray()
        if config.near:
            self._find_repeats(config.max_distance, tell)

    def changed(self) -> list[int]:
        """The numbers, in `names`, of the shards whose records say otherwise or lack a clip."""
        states = np.frombuffer(self._states, np.uint8)
        has_none = (self.originals >= 0) | self.orphans
        sources = has_none & (states != _COPY) | (~has_none & (states == _COPY))
        sources |= self._hashes(self.originals, self._ids) != np.frombuffer(
            self._noted_originals, np.uint64
        )
        reasons = np.frombuffer(self._reasons, np.uint32)
        stored = np.frombuffer(self._stored, np.uint8)
        wanted = np.where(stored > 0, _KEPT, _MISSING)
        wanted = np.where(self.firsts >= 0, _REPEATS, wanted)
        wanted = np.where(reasons > 0, _REJECTED, wanted)
        clips = wanted != np.frombuffer(self._outcomes, np.uint8)
        clips |= self._hashes(self.firsts, self._keys) != np.frombuffer(
            self._noted_firsts, np.uint64
        )
        # Not stored in the shard, but perhaps among its spare clips.
        clips |= wanted == _MISSING
        sources |= self.orphans | self._of_sources(clips)
        return [
            number
            for number, (start, end) in enumerate(pairwise(self._source_starts))
            if sources[start:end].any()
        ]

    def rulings(self, number: int) -> list[SourceRuling]:
        """What becomes of the sources of a shard, in order."""
        found = []
        for source in range(self._source_starts[number], self._source_starts[number + 1]):
            original = int(self.originals[source])
            clips = range(self._clip_starts[source], self._clip_starts[source + 1])
            found.append(
                SourceRuling(
                    original=self._ids[original] if original >= 0 else None,
                    is_orphan=bool(self.orphans[source]),
                    clips=tuple(self._ruling(clip) for clip in clips),
                )
            )
        return found

    def copies(self) -> Iterator[str]:
        """The ids of all sources that have no clips because others had the same bytes."""
        for source in np.flatnonzero((self.originals >= 0) | self.orphans).tolist():
            yield self._ids[source]

    @property
    def num_copies(self) -> int:
        """How many sources are copies."""
        return int((self.originals >= 0).sum())

    @property
    def num_repeats(self) -> int:
        """How many clips repeat an earlier one."""
        return int((self.firsts >= 0).sum())

    def _ruling(self, clip: int) -> ClipRuling:
        mask, first = self._reasons[clip], int(self.firsts[clip])
        reasons = tuple(reason for reason, bit in _BIT.items() if mask & bit)
        return ClipRuling(reasons, self._keys[first] if first >= 0 else None)

    def _add(self, record: dict[str, Any], judge: Judge) -> None:
        members = record["members"]
        for source in record["sources"]:
            clips = source["clips"]
            self._ids.append(source["id"])
            self._sha += bytes.fromhex(source["sha256"]).ljust(_SHA_BYTES, b"\0")[:_SHA_BYTES]
            self._states.append(_state(source))
            self._noted_originals.append(_short_hash(source.get("duplicate_of")))
            for clip in clips:
                self._keys.append(clip["key"])
                signature = bytes.fromhex(clip.get("signature", ""))
                if len(signature) not in (0, _SIGNATURE_BYTES):
                    raise ValueError(f"a signature of {len(signature)} bytes")
                hashes = _HASHES.unpack(signature.ljust(_SIGNATURE_BYTES, b"\0"))
                for column, value in zip(self._words, hashes, strict=True):
                    column.append(value)
                self._reasons.append(sum(_BIT[reason] for reason in set(judge(clip))))
                self._stored.append(f"{clip['key']}.mp4" in members)
                self._outcomes.append(_outcome(clip))
                self._noted_firsts.append(_short_hash(clip.get("duplicate_of")))
            self._clip_starts.append(len(self._outcomes))
        self._source_starts.append(len(self._states))

    def _find_copies(self) -> None:
        states = np.frombuffer(self._states, np.uint8)
        words = np.frombuffer(self._sha, np.uint64).reshape(-1, _SHA_BYTES // 8)
        rows = np.flatnonzero((states != _FAILED) & words.any(axis=1))
        order = rows[np.lexsort((rows, *words[rows].T))]
        if not len(order):
            return
        fresh = np.ones(len(order), bool)
        fresh[1:] = (words[order[1:]] != words[order[:-1]]).any(axis=1)
        group = np.cumsum(fresh) - 1
        nobody = len(states)
        # The first that has been worked on; where none has, the first has to be.
        original = np.full(group[-1] + 1, nobody)
        worked = states[order] == _WORKED
        np.minimum.at(original, group[worked], order[worked])
        without = original == nobody
        original[without] = order[fresh][without]
        self.orphans[original[without]] = True
        copies = original[group] != order
        self.originals[order[copies]] = original[group][copies]

    def _find_repeats(self, max_distance: float, tell: Tell) -> None:
        # Here, since a run without near-duplicates needs none of it.
        from pipelines.curation.hash_search import SignatureSearch

        families = np.repeat(
            np.arange(len(self._states), dtype=np.uint32),
            np.diff(np.frombuffer(self._clip_starts, np.uint64)).astype(np.int64),
        )
        has_clips = (self.originals < 0) & ~self.orphans
        takes_part = (np.frombuffer(self._reasons, np.uint32) == 0) & has_clips[families]
        clips = np.flatnonzero(takes_part)
        chosen = np.empty((NUM_FRAMES, len(clips)), np.uint64)
        for frame in range(NUM_FRAMES):
            chosen[frame] = np.frombuffer(self._words[frame], np.uint64)[clips]
            # Half of what is held, and not needed any more.
            self._words[frame] = array("Q")
        found = SignatureSearch(chosen, families[clips], max_distance).first_alike(tell)
        repeats = found >= 0
        self.firsts[clips[repeats]] = clips[found[repeats]]

    def _hashes(self, targets: np.ndarray, names: "_TextColumn") -> np.ndarray:
        """Short hashes of the names that are pointed at, 0 for -1."""
        hashes = np.zeros(len(targets), np.uint64)
        for place in np.flatnonzero(targets >= 0).tolist():
            hashes[place] = _short_hash(names[int(targets[place])])
        return hashes

    def _of_sources(self, clips: np.ndarray) -> np.ndarray:
        """Which sources have one of the clips that are marked."""
        ends = np.frombuffer(self._clip_starts, np.uint64).astype(np.int64)
        counts = np.concatenate([[0], np.cumsum(clips)])
        return counts[ends[1:]] > counts[ends[:-1]]


class _TextColumn:
    """Many short texts in little memory."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._ends = array("Q", [0])

    def append(self, text: str) -> None:
        self._text += text.encode()
        self._ends.append(len(self._text))

    def __getitem__(self, index: int) -> str:
        return self._text[self._ends[index] : self._ends[index + 1]].decode()


def _state(source: dict[str, Any]) -> int:
    if source["verdict"] == "failed":
        return _FAILED
    if source["clips"] or not {DUPLICATE, NOT_STORED} & set(source["reasons"]):
        return _WORKED
    return _UNTIDY_COPY if source.get("info") or source.get("scores") else _COPY


def _outcome(clip: dict[str, Any]) -> int:
    if clip["verdict"] == "kept":
        return _KEPT
    if DUPLICATE in clip["reasons"]:
        return _REPEATS
    return _MISSING if NOT_STORED in clip["reasons"] else _REJECTED


def _short_hash(name: str | None) -> int:
    if name is None:
        return 0
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
