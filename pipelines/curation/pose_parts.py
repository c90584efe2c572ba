"""How much of the main person's keypoints is missing, by parts.

T frames, P people, K keypoints (18 or 128)
"""

from pipelines.curation.filters import Series
from pipelines.pose import PoseTrack
from pipelines.schema import Scores


def pose_scores(track: PoseTrack) -> tuple[Scores, Series]:
    """Missing shares of the main person, person 0 of the track.

    hands_missing, face_points_missing: of the hands' and face's points over all frames; None where
        the network gives the body alone.
    Series `pose_missing`: of the 18 joints of the body, a frame; 1 where nobody was detected.
    """
    raise NotImplementedError
