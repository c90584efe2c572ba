"""What the faces of a clip are like, and which of them is the main one.

T frames, D embedding size
"""

from collections.abc import Sequence

import numpy as np

from pipelines.curation.filters import Series
from pipelines.faces import Face
from pipelines.schema import Scores


def main_faces(faces: Sequence[Sequence[Face]]) -> list[int | None]:
    """For each frame, which of its faces is the main one: the index in it, or None."""
    raise NotImplementedError


def face_scores(
    frames: Sequence[np.ndarray],
    faces: Sequence[Sequence[Face]],
    embeddings: Sequence[np.ndarray | None],
) -> tuple[Scores, Series]:
    """Scores of the main face of a clip, and the series `face_score` of the best face a frame.

    Args:
        frames: T sampled uint8 RGB frames (H, W, 3).
        faces: the faces found in each.
        embeddings: (D,) of the face that `main_faces` names, a frame; None where there is none or
            the face model knows no identity.
    """
    raise NotImplementedError
