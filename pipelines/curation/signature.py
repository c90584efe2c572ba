"""What a clip looks like in 512 bits, by which copies of it are known again.

A signature is 8 perceptual hashes (pHash: signs of the 8 x 8 lowest DCT frequencies about their
median) of 64 bits, 16 hex digits each and 128 in all, of frames at the middles of 8 equal parts of
the clip. Black bars are cut off before. Places are shares of the clip's length, so another frame
rate changes nothing, and a copy that is trimmed a little still shows nearly the same at each.

A frame that shows nothing, black or plain, has the hash of 16 zeros (PLAIN): the signs of its
noise would be anything. Such frames are left out of a comparison; clips that share fewer than
MIN_SHARED others are not comparable.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from pipelines.curation.quality import picture_area, reduced

NUM_FRAMES = 8
HASH_BITS = 64
HASH_DIGITS = HASH_BITS // 4
PLAIN = "0" * HASH_DIGITS
MIN_SHARED = 4
# Grey levels spread by less (standard deviation, 0..255) in a frame that shows nothing.
_MIN_SPREAD = 4.0


def clip_signature(frames: Sequence[np.ndarray]) -> str:
    """The signature of T sampled uint8 RGB frames (H, W, 3) of one size; "" for none."""
    if not len(frames):
        return ""
    places = (np.arange(NUM_FRAMES) + 0.5) * len(frames) / NUM_FRAMES
    chosen = [frames[int(place)] for place in places]
    grey = np.stack([reduced(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)) for frame in chosen])
    rows, columns = picture_area(grey)
    return "".join(_hash(frame) for frame in grey[:, slice(*rows), slice(*columns)])


def _hash(grey: np.ndarray) -> str:
    if grey.std() < _MIN_SPREAD:
        return PLAIN
    # Here, since what compares signatures needs none of what it loads.
    import imagehash
    from PIL import Image

    return str(imagehash.phash(Image.fromarray(np.ascontiguousarray(grey))))


def hashes(signature: str) -> list[int | None]:
    """The hashes of a signature as numbers, None for a frame that shows nothing."""
    parts = [signature[i : i + HASH_DIGITS] for i in range(0, len(signature), HASH_DIGITS)]
    return [None if part == PLAIN else int(part, 16) for part in parts]


def distance(a: str, b: str) -> float:
    """Bits, of 64, by which two clips differ, the mean over the frames that both show.

    64 where they share fewer than MIN_SHARED such frames, or one has no signature.
    """
    pairs = zip(hashes(a), hashes(b), strict=False)
    bits = [(one ^ two).bit_count() for one, two in pairs if one is not None and two is not None]
    return sum(bits) / len(bits) if len(bits) >= MIN_SHARED else float(HASH_BITS)
