"""The people of a clip: how many, how large the main one is, and who walks in front of whom.

T frames, P people
"""

from collections.abc import Sequence

from pipelines.faces import Face
from pipelines.pose import PoseTrack
from pipelines.schema import Scores


def people_scores(track: PoseTrack, faces: Sequence[Sequence[Face]]) -> Scores:
    """Scores of the people over sampled frames.

    people: how many are in the picture together.
    main_height: height of the main person as a share of the frame's; None for nobody.
    main_presence: share of frames with the main person.
    people_crossing: share of frames in which another person covers the main one.
    """
    raise NotImplementedError
