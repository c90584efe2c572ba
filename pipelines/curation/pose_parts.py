"""How much of the main person's keypoints is missing, by parts.

T frames, P people, K keypoints (18 or 128)
"""

import numpy as np

from animator.keypoints import BODY, FACE, LEFT_HAND, RIGHT_HAND, VISIBLE
from pipelines.curation.filters import Series
from pipelines.pose import PoseTrack
from pipelines.schema import Scores


def pose_scores(track: PoseTrack) -> tuple[Scores, Series]:
    """Missing shares of the main person, person 0 of the track.

    hands_missing, face_points_missing: of the hands' and face's points over all frames; None where
        the network gives the body alone.
    Series `pose_missing`: of the 18 joints of the body, a frame; 1 where nobody was detected.
    """
    missing = track.main()[1] < VISIBLE
    hands = np.concatenate([missing[:, LEFT_HAND], missing[:, RIGHT_HAND]], axis=1)
    scores: Scores = {
        "hands_missing": _share(hands),
        "face_points_missing": _share(missing[:, FACE]),
    }
    return scores, {"pose_missing": missing[:, BODY].mean(axis=1).tolist()}


def _share(missing: np.ndarray) -> float | None:
    return float(missing.mean()) if missing.size else None
