"""Random numbers that belong to samples: the same ones in whatever batch a sample is drawn.

A counter-based generator gives every sample a stretch of its own, so whole batches are drawn at
once and no sample needs a generator.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

_WORDS = 8  # 32-bit words that one count of Philox 4x64 gives


def uniforms(seed: int, samples: Sequence[int], count: int, stream: int = 0) -> Tensor:
    """`(len(samples), count)` float32 numbers inside 0..1, never 0 or 1 themselves.

    Args:
        seed: of the run, an integer ≥ 0.
        samples: sample numbers ≥ 0; a batch of neighbours is fastest.
        count: numbers a sample. Another count gives other numbers.
        stream: keeps draws for different purposes apart.
    """
    blocks = -(-count // _WORDS)
    parts = [
        _words(seed, stream, run.start * blocks, len(run) * blocks).reshape(len(run), -1)[:, :count]
        for run in _runs(samples)
    ]
    words = np.concatenate(parts) if parts else np.zeros((0, count), np.uint32)
    # 23 bits and a half: the middle of each step, which float32 holds exactly.
    return torch.from_numpy(((words >> 9).astype(np.float32) + 0.5) * np.float32(2**-23))


def normals(uniform: Tensor) -> Tensor:
    """Numbers inside 0..1 as numbers of the standard normal distribution, one for one."""
    return torch.special.ndtri(uniform)


def between(uniform: Tensor, limits: tuple[float, float]) -> Tensor:
    """Numbers inside 0..1 spread evenly over the limits."""
    return limits[0] + (limits[1] - limits[0]) * uniform


def between_logs(uniform: Tensor, limits: tuple[float, float]) -> Tensor:
    """Numbers inside 0..1 spread evenly over the logarithms of limits above 0."""
    return limits[0] * (limits[1] / limits[0]) ** uniform


def _words(seed: int, stream: int, start: int, blocks: int) -> np.ndarray:
    # Philox's raw words are part of NumPy's promise of streams that never change.
    source = np.random.Philox(key=np.array([seed, stream], np.uint64), counter=start)
    return np.atleast_1d(source.random_raw(4 * blocks)).astype("<u8").view("<u4")


def _runs(samples: Sequence[int]) -> Iterator[range]:
    """Stretches of sample numbers that follow each other."""
    if isinstance(samples, range) and samples.step == 1:
        if len(samples):
            yield samples
        return
    start = 0
    for i in range(1, len(samples) + 1):
        if i == len(samples) or samples[i] != samples[i - 1] + 1:
            yield range(samples[start], samples[i - 1] + 1)
            start = i
