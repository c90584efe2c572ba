"""Near neighbours among millions of 512-bit signatures: none is missed, few are compared in vain.

n signatures of W = 8 frames, a word of 64 bits each; a word of 0 is a frame that shows nothing

How none is missed. Let a span of bits be cut into m bands, and let two signatures differ in at most
D < m bits of it. Then at least m - D bands are equal. Deal the bands to g groups of neighbours: in
some group at least t = ceil((m - D) / g) bands are equal (pigeonhole). A table sorts by the bits of
t bands of one group; with a table for every choice of t bands of every group, any two that are near
stand in one bucket of at least one. Signatures that differ by at most d bits a frame, in the mean,
differ by at most D = 8 d of all 512 bits if they show all frames; if not, by at most D = d of the
64 bits of some frame that both show. So the first are sought in tables over all bits, those with
frames that show nothing in tables over each frame. This holds for every d: where m > D bands would
cost more than they spare, one table is left with all signatures in one bucket.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from pipelines.curation.signature import HASH_BITS, MIN_SHARED, NUM_FRAMES

# Seconds, measured: a signature in one table, and two signatures that share a bucket.
_SECONDS_PER_ROW = 1.3e-7
_SECONDS_PER_PAIR = 6e-8
# Hashes of pictures are not quite random: this share of a key's bits tells them apart.
_USEFUL_BITS = 0.85
_MIX = np.uint64(0x9E3779B97F4A7C15)
_FILTER_BITS = 22
_FIRST_DEPTH = 16
_MOST_PENDING = 1 << 22
_ALL_SHOWN = (1 << NUM_FRAMES) - 1

_UNKNOWN, _FIRST, _REPEAT = 0, 1, 2

Tell = Callable[[int, int], Any]


@dataclass(frozen=True)
class Table:
    """The bits by which one table sorts: `mask` of the 64 bits that begin at bit `start`."""

    start: int
    mask: int


class SignatureSearch:
    """Signatures among which repeats are sought.

    Args:
        words: uint64 (W, n).
        families: integers (n,); signatures of one family never repeat each other.
        max_distance: bits of 64 by which those that are alike may differ, the mean over the frames
            that both show, as `signature.distance` has it.
    """

    def __init__(self, words: np.ndarray, families: np.ndarray, max_distance: float) -> None:
        self.words = words
        self.families = families
        self.max_distance = max_distance
        self.count = words.shape[1]
        self.place = np.uint64(max(1, self.count - 1).bit_length())
        self.shown = np.zeros(self.count, np.uint8)
        for frame in range(NUM_FRAMES):
            self.shown |= (words[frame] != 0).astype(np.uint8) << np.uint8(frame)

    def first_alike(self, tell: Tell = lambda done, total: None) -> np.ndarray:
        """For each, in order: the first earlier one that it repeats, or -1 if it is new itself.

        One repeats an earlier one that is new, of another family and alike. Exactly what comparing
        each with all the new ones before it would give.

        Args:
            tell: called with the number of tables done and their total.

        Returns:
            int64 (n,).
        """
        state = np.zeros(self.count, np.uint8)
        found = np.full(self.count, -1, np.int64)
        todo, depth = np.arange(self.count), _FIRST_DEPTH
        while len(todo):
            # What repeats another is out of the way of the rest: a crowd of copies thins out.
            alive = np.flatnonzero(state != _REPEAT)
            pairs, cut_off = self._alike(alive, todo, depth, tell)
            todo = _settle(state, found, todo, pairs, cut_off)
            depth *= 4
        return found

    def _alike(
        self, alive: np.ndarray, todo: np.ndarray, depth: int, tell: Tell
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pairs that are alike, of an earlier one of `alive` and a later one of `todo`.

        Each of `todo` is compared with the first `depth` of its bucket. Returns the pairs, later
        and earlier, int64 (k, 2), sorted, and which of all had more before them, bool (n,).
        """
        cut_off = np.zeros(self.count, bool)
        known, pending, num_pending = np.zeros(0, np.uint64), [], 0
        joins = list(self._joins(alive, todo))
        for done, (table, early, late) in enumerate(joins):
            tell(done, len(joins))
            for pair in self._bucket_mates(table, early, late, depth, cut_off):
                one, other = self._near(table, *pair)
                pending.append(other.astype(np.uint64) << np.uint64(32) | one.astype(np.uint64))
                num_pending += len(one)
            if num_pending > _MOST_PENDING:
                known, pending, num_pending = np.unique(np.concatenate([known, *pending])), [], 0
        known = np.unique(np.concatenate([known, *pending]))
        pairs = np.stack([known >> np.uint64(32), known & np.uint64(0xFFFFFFFF)], axis=1)
        return pairs.astype(np.int64), cut_off

    def _joins(
        self, alive: np.ndarray, todo: np.ndarray
    ) -> Iterator[tuple[Table, np.ndarray, np.ndarray]]:
        """The tables to be made, each with the earlier and the later ones that it compares."""
        whole = self.shown == _ALL_SHOWN
        early, late = alive[whole[alive]], todo[whole[todo]]
        all_bits = NUM_FRAMES * HASH_BITS
        for table in choose_tables(all_bits, int(8 * self.max_distance), len(early), len(late)):
            yield table, early, late
        for frame in range(NUM_FRAMES):
            shows = (self.shown >> np.uint8(frame) & 1).astype(bool)
            for some, others in ((~whole, shows), (whole, ~whole)):
                early, late = alive[(some & shows)[alive]], todo[(others & shows)[todo]]
                for table in choose_tables(
                    HASH_BITS, int(self.max_distance), len(early), len(late)
                ):
                    yield Table(frame * HASH_BITS, table.mask), early, late

    def _bucket_mates(
        self, table: Table, early: np.ndarray, late: np.ndarray, depth: int, cut_off: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(earlier, later) that share a bucket: all of `late` with the q-th of theirs, q by q.

        Marks in `cut_off` those whose buckets hold more than `depth` earlier ones.
        """
        lowest = np.uint64((1 << int(self.place)) - 1)
        keyed, wanted = self._keys(table, early), None
        if not np.array_equal(early, late):
            wanted = self._keys(table, late)
            keyed, wanted = _with_mates(keyed, wanted)
            wanted.sort()
        keyed.sort()
        if wanted is None:
            wanted = keyed
        # Within a bucket the order is that of the signatures: its first member is its earliest.
        mate = np.searchsorted(keyed, wanted & ~lowest)
        for step in range(depth + 1):
            inside = mate < len(keyed)
            mate, wanted = mate[inside], wanted[inside]
            # The same key and an earlier number: smaller, and with no other bits in front.
            other = keyed[mate]
            earlier = (other < wanted) & ((other ^ wanted) <= lowest)
            mate, wanted, other = mate[earlier], wanted[earlier], other[earlier]
            if not len(mate):
                return
            last = (wanted & lowest).astype(np.int64)
            if step == depth:
                cut_off[last] = True
                return
            yield (other & lowest).astype(np.int64), last
            mate += 1

    def _keys(self, table: Table, chosen: np.ndarray) -> np.ndarray:
        """uint64: a hash of the table's bits in front, the signature's number in the last `place`.

        Equal bits give equal keys. Unequal ones hardly ever do, and are then compared in vain.
        """
        word, shift = divmod(table.start, HASH_BITS)
        values = self.words[word]
        if shift:
            following = self.words[word + 1] << np.uint64(HASH_BITS - shift)
            values = values >> np.uint64(shift) | following
        if len(chosen) < self.count:
            values = values[chosen]
        keys = (values & np.uint64(table.mask)) * _MIX
        keys >>= self.place
        keys <<= self.place
        keys |= chosen.astype(np.uint64)
        return keys

    def _near(
        self, table: Table, early: np.ndarray, late: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Those of the pairs that are alike; most of the others are out after two words."""
        strangers = self.families[early] != self.families[late]
        early, late = early[strangers], late[strangers]
        both = self.shown[early] & self.shown[late]
        bits = np.zeros(len(early), np.uint16)
        most = int(NUM_FRAMES * self.max_distance)
        # Words far from the one whose bits are known to agree tell most.
        for step in (4, 2, 6, 3, 5, 1, 7, 0):
            frame = (table.start // HASH_BITS + step) % NUM_FRAMES
            word = self.words[frame]
            bits += np.bitwise_count(word[early] ^ word[late]) * (both >> np.uint8(frame) & 1)
            near = bits <= most
            if not near.all():
                early, late, both, bits = early[near], late[near], both[near], bits[near]
        shared = np.bitwise_count(both)
        near = (shared >= MIN_SHARED) & (bits / np.maximum(shared, 1) <= self.max_distance)
        return early[near], late[near]


def choose_tables(num_bits: int, max_bits: int, num_early: int, num_late: int) -> list[Table]:
    """The cheapest tables over bits 0..num_bits in which all that differ by `max_bits` meet."""
    pairs = num_early * num_late
    best, chosen = pairs * _SECONDS_PER_PAIR, (1, 1, 0)
    if not pairs:
        return []
    for num_bands in range(max_bits + 1, num_bits // 2 + 1):
        width = num_bits / num_bands
        for num_groups in range(1, num_bands + 1):
            small, larger = divmod(num_bands, num_groups)
            # A group is read as one word, and so never holds the same place of two frames.
            if math.ceil((small + bool(larger)) * width) > HASH_BITS:
                continue
            equal = -(-(num_bands - max_bits) // num_groups)
            count = larger * math.comb(small + 1, equal)
            count += (num_groups - larger) * math.comb(small, equal)
            in_bucket = pairs / 2 ** (_USEFUL_BITS * width * equal)
            rows = (num_early + num_late) / 2
            cost = count * (rows * _SECONDS_PER_ROW + in_bucket * _SECONDS_PER_PAIR)
            if count and cost < best:
                best, chosen = cost, (num_bands, num_groups, equal)
    return list(_tables(num_bits, *chosen))


def _tables(num_bits: int, num_bands: int, num_groups: int, equal: int) -> Iterator[Table]:
    if equal == 0:
        yield Table(0, 0)
        return
    edges = [band * num_bits // num_bands for band in range(num_bands + 1)]
    groups = [group * num_bands // num_groups for group in range(num_groups + 1)]
    for first, last in pairwise(groups):
        start = min(edges[first], num_bits - HASH_BITS)
        # A group of fewer bands than must be equal gives no table: it cannot be the one.
        for bands in combinations(range(first, last), equal):
            spans = [(edges[band] - start, edges[band + 1] - start) for band in bands]
            yield Table(start, sum((1 << high) - (1 << low) for low, high in spans))


def _with_mates(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The larger of two sets of keys without most of those that have no equal in the smaller."""
    small, large = (one, other) if len(one) < len(other) else (other, one)
    front = np.uint64(HASH_BITS - _FILTER_BITS)
    there = np.zeros(1 << _FILTER_BITS, bool)
    there[small >> front] = True
    large = large[there[large >> front]]
    return (small, large) if len(one) < len(other) else (large, small)


def _settle(
    state: np.ndarray, found: np.ndarray, todo: np.ndarray, pairs: np.ndarray, cut_off: np.ndarray
) -> np.ndarray:
    """Decide in order which of `todo` are new and which repeat; returns those still open.

    Open is what was not compared with all before it, or has a neighbour that is open itself.
    """
    late, starts = np.unique(pairs[:, 0], return_index=True)
    ends = np.append(starts, len(pairs))[1:]
    lonely = np.ones(len(state), bool)
    lonely[late] = False
    state[todo[lonely[todo] & ~cut_off[todo] & (state[todo] == _UNKNOWN)]] = _FIRST
    still_open = cut_off
    for j, start, end in zip(late.tolist(), starts.tolist(), ends.tolist(), strict=True):
        waits = bool(cut_off[j])
        for i in pairs[start:end, 1].tolist():
            if state[i] == _FIRST:
                found[j] = i if found[j] < 0 else min(found[j], i)
                state[j] = _REPEAT
                break
            waits = waits or state[i] == _UNKNOWN
        if state[j] == _UNKNOWN and not waits:
            state[j] = _FIRST
        still_open[j] = waits
    return todo[still_open[todo]]
