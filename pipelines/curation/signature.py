"""What a clip looks like in 512 bits, by which copies of it are known again.

A signature is 8 perceptual hashes of 64 bits, 16 hex digits each and 128 in all, of frames at the
middles of 8 equal parts of the clip. A frame that shows nothing has the hash of 16 zeros.
"""

from collections.abc import Sequence

import numpy as np

NUM_FRAMES = 8
HASH_BITS = 64
HASH_DIGITS = HASH_BITS // 4
PLAIN = "0" * HASH_DIGITS


def clip_signature(frames: Sequence[np.ndarray]) -> str:
    """The signature of T sampled uint8 RGB frames; "" for none."""
    raise NotImplementedError


def distance(a: str, b: str) -> float:
    """Bits, of 64, by which two clips differ, the mean over their frames; 64 if nobody knows."""
    raise NotImplementedError
