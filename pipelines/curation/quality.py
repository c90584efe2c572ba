"""What the picture is like: sharpness, light, bars at the edges and burnt-in text.

T frames, H W height and width; frames are uint8 RGB (H, W, 3), all of one size
"""

from collections.abc import Sequence

import numpy as np

from pipelines.curation.filters import Series
from pipelines.schema import Scores


def picture_scores(frames: Sequence[np.ndarray]) -> tuple[Scores, Series]:
    """Scores of the picture over sampled frames; no series, since none is judged by frames.

    sharpness: variance of the Laplacian at 160 pixels of the shorter side, the median over frames.
    luma: mean brightness, 0..255.
    clipped_share: share of pixels that are burnt out or drowned in black.
    black_bars: share of the frame that plain or blurred bars at its edges take.
    text_share: share of the frame that burnt-in text covers.
    """
    raise NotImplementedError
