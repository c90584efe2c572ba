"""The order of training data as a function of one number: samples seen → clip.

Every epoch is a permutation of the clips that depends on nothing but the seed and the epoch's
number, so a resumed run, or one with another number of workers, reads the same clips.
"""

from functools import lru_cache

import numpy as np


class ClipOrder:
    """Which clip the n-th sample of a run is; each epoch visits every clip once.

    Args:
        num_clips: clips in the store, at least 1.
        seed: any integer ≥ 0.

    Raises:
        ValueError: no clips, or a negative seed.
    """

    def __init__(self, num_clips: int, seed: int) -> None:
        if num_clips < 1:
            raise ValueError(
                f"ClipOrder got {num_clips} clips, expected at least 1: curate some data first."
            )
        if seed < 0:
            raise ValueError(f"ClipOrder got seed {seed}, expected an integer ≥ 0.")
        self.num_clips = num_clips
        self.seed = seed

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
        return int(_permutation(self.num_clips, self.seed, epoch)[position])


@lru_cache(maxsize=4)
def _permutation(num_clips: int, seed: int, epoch: int) -> np.ndarray:
    # Raw 64-bit words and a stable sort: NumPy promises these never change between versions,
    # which it does not promise for Generator.permutation.
    words = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_clips)
    return np.argsort(words, kind="stable")
