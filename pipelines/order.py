"""The order of training data as a function of one number: samples seen → clip.

Every epoch is a permutation of the clips that depends on nothing but the seed and the epoch's
number, so a resumed run, or one with another number of workers, reads the same clips. Clips of
several sizes lie in buckets, and the samples of one step are all of one bucket.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

# Streams of random words, beside the buckets' own numbers.
_ROUND, _OTHERS = 1 << 31, (1 << 31) + 1


class ClipOrder:
    """Which clip the n-th sample of a run is; each epoch visits every clip once.

    Args:
        num_clips: clips in the store, at least 1.
        seed: any integer ≥ 0.
        stream: another one gives other permutations.

    Raises:
        ValueError: no clips, or a negative seed.
    """

    def __init__(self, num_clips: int, seed: int, stream: int = 0) -> None:
        if num_clips < 1:
            raise ValueError(
                f"ClipOrder got {num_clips} clips, expected at least 1: curate some data first."
            )
        if seed < 0:
            raise ValueError(f"ClipOrder got seed {seed}, expected an integer ≥ 0.")
        self.num_clips = num_clips
        self.seed = seed
        self.stream = stream

    def epoch(self, sample: int) -> int:
        """The epoch that sample belongs to."""
        return sample // self.num_clips

    def clip(self, sample: int) -> int:
        """The clip that sample number `sample` (≥ 0) reads.

        Raises:
            ValueError: a negative sample number.
        """
        if sample < 0:
            raise ValueError(f"ClipOrder.clip got sample {sample}, expected a number ≥ 0.")
        epoch, position = divmod(sample, self.num_clips)
        return int(_permutation(self.num_clips, self.seed, epoch, self.stream)[position])


class BucketOrder:
    """Which clip the n-th sample of a run is, where the samples of one step share a bucket.

    Steps come in rounds in which every bucket has as many steps as its share of the clips, spread
    evenly, so that over many steps each clip is seen equally often. With one bucket it is the
    order of `ClipOrder`.

    Args:
        buckets: the clips of each bucket, at least one in each.
        seed: any integer ≥ 0.
        global_batch: samples of a step.

    Raises:
        ValueError: no buckets, an empty one, a batch of none, or a negative seed.
    """

    def __init__(self, buckets: Sequence[Sequence[int]], seed: int, global_batch: int) -> None:
        if not buckets:
            raise ValueError("BucketOrder got no buckets, expected at least one with clips in it.")
        if global_batch < 1:
            raise ValueError(
                f"BucketOrder got steps of {global_batch} samples, expected 1 or more."
            )
        self.buckets = tuple(tuple(bucket) for bucket in buckets)
        self.seed = seed
        self.global_batch = global_batch
        sizes = [len(bucket) for bucket in self.buckets]
        self.num_clips = sum(sizes)
        self._orders = [ClipOrder(size, seed, stream) for stream, size in enumerate(sizes)]
        common = math.gcd(*sizes)
        self._shares = tuple(size // common for size in sizes)  # steps of each bucket in a round

    def epoch(self, sample: int) -> int:
        """The epoch that sample belongs to."""
        return sample // self.num_clips

    def bucket(self, sample: int) -> int:
        """The bucket of the step that sample number `sample` (≥ 0) belongs to."""
        return self._place(sample)[0]

    def clip(self, sample: int) -> int:
        """The clip that sample number `sample` (≥ 0) reads.

        Raises:
            ValueError: a negative sample number.
        """
        if sample < 0:
            raise ValueError(f"BucketOrder.clip got sample {sample}, expected a number ≥ 0.")
        bucket, own = self._place(sample)
        return self.buckets[bucket][self._orders[bucket].clip(own)]

    def others(self, sample: int) -> Iterator[int]:
        """The other clips of the sample's bucket in a random order of its own, each once.

        They stand in where the sample's clip cannot be read.
        """
        clips = self.buckets[self.bucket(sample)]
        tried = {self.clip(sample)}
        words = np.random.PCG64(np.random.SeedSequence([self.seed, sample, _OTHERS]))
        while len(tried) < len(clips):
            clip = clips[int(words.random_raw()) % len(clips)]
            if clip not in tried:
                tried.add(clip)
                yield clip

    def _place(self, sample: int) -> tuple[int, int]:
        """The sample's bucket, and its number among the samples of that bucket."""
        step, offset = divmod(sample, self.global_batch)
        number, position = divmod(step, sum(self._shares))
        bucket, before = _round(self._shares, self.seed, number)
        here = int(bucket[position])
        step_of_bucket = number * self._shares[here] + int(before[position])
        return here, step_of_bucket * self.global_batch + offset


@lru_cache(maxsize=32)
def _permutation(num_clips: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    # Raw 64-bit words and a stable sort: NumPy promises these never change between versions,
    # which it does not promise for Generator.permutation.
    key = [seed, epoch, stream] if stream else [seed, epoch]
    words = np.random.PCG64(np.random.SeedSequence(key)).random_raw(num_clips)
    return np.argsort(words, kind="stable")


@lru_cache(maxsize=4)
def _round(shares: tuple[int, ...], seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The bucket of each step of a round, and how many steps of that bucket came before."""
    words = np.random.PCG64(np.random.SeedSequence([seed, number, _ROUND]))
    # A bucket of m steps has one in each m-th of the round, anywhere in it.
    times = [
        (np.arange(share) + (words.random_raw(share) >> 11) * 2.0**-53) / share for share in shares
    ]
    label = np.repeat(np.arange(len(shares)), shares)
    rank = np.concatenate([np.arange(share) for share in shares])
    order = np.argsort(np.concatenate(times), kind="stable")
    return label[order], rank[order]
