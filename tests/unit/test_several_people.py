"""Several people in one picture and one clip: each with the face of the one who is meant."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from animator.model import Animator
from inference.clip_alignment import AlignmentSettings
from inference.conditioning import ReferenceEncoder
from inference.people import faces_of_people
from inference.perception import Pose
from inference.pipeline import AnimationPipeline, PreparedClip
from inference.sampler import SamplerConfig
from inference.settings import AnimationSettings
from pipelines.faces import Face
from tests.unit.test_regions import standing
from tests.unit.test_tasks import SMALL

FRAMES, SIDE = 3, 64
SAMPLING = SamplerConfig(steps=2, sigma_min=0.05, sigma_max=20.0)


def face(x: float) -> Face:
    return Face(box=np.array([x - 0.08, 0.1, x + 0.08, 0.27], np.float32), score=0.9)


LEFT, RIGHT = face(0.25), face(0.75)


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)


def pose(*xs: float, frames: int | None = None) -> Pose:
    points = np.stack([standing(x) for x in xs])
    points = points if frames is None else np.repeat(points[None], frames, 0)
    return Pose(points, np.ones(points.shape[:-1], np.float32), (SIDE, SIDE))


@pytest.fixture
def pipeline() -> AnimationPipeline:
    torch.manual_seed(0)
    model = Animator(SMALL).eval()
    for parameter in model.parameters():  # zero-initialised layers would hide every face
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    settings = AnimationSettings(sampling=SAMPLING)
    return AnimationPipeline(model, ReferenceEncoder(SMALL), None, settings)


def animate(
    pipeline: AnimationPipeline,
    *people: int,
    driving: tuple[float, ...] = (0.25, 0.75),
    faces: tuple[Face, ...] = (LEFT, RIGHT),
    align: bool = True,
) -> tuple[PreparedClip, np.ndarray]:
    """The clip as it was prepared, and its frames; the main person of the picture is the right."""
    seen: list[PreparedClip] = []
    result = pipeline(
        picture(),
        pose(0.75, 0.25),
        pose(*driving, frames=FRAMES),
        fps=10.0,
        face=next((one for one in faces if one is RIGHT), None),
        faces=faces,
        align=align,
        size=(SIDE, SIDE),
        settings=replace(pipeline.settings, alignment=AlignmentSettings(people=people)),
        refinement=lambda clip: seen.append(clip),
    )
    return seen[0], result.frames


def tokens(clip: PreparedClip) -> torch.Tensor:
    """Face tokens of each person, `(P, F, D)`."""
    return clip.conditions.context[0, 1:].unflatten(0, (-1, SMALL.num_face_tokens))


def region(clip: PreparedClip, x: float) -> int:
    """Whose region the middle height is at `x`, in the first frame."""
    regions = clip.conditions.regions
    assert regions is not None
    found = regions[[0]][0]
    return int(found[found.shape[0] // 2, int(x * found.shape[1])])


def test_each_person_of_the_clip_has_the_face_of_the_person_it_is_matched_with(
    pipeline: AnimationPipeline,
) -> None:
    clip, _ = animate(pipeline)
    left, right = tokens(clip)[region(clip, 0.25)], tokens(clip)[region(clip, 0.75)]
    alone = {
        name: pipeline._encode(picture(), [one], clip.framing, 0).context[0, 1:]
        for name, one in (("left", LEFT), ("right", RIGHT))
    }
    torch.testing.assert_close(left, alone["left"])
    torch.testing.assert_close(right, alone["right"])
    assert not torch.allclose(left, right)


def test_swapped_references_swap_the_faces_and_places_of_the_tracks(
    pipeline: AnimationPipeline,
) -> None:
    same, frames = animate(pipeline, 1, 2)
    swapped, _ = animate(pipeline, 2, 1)
    _, default = animate(pipeline)
    assert np.array_equal(default, frames)
    assert not torch.allclose(tokens(same)[0], tokens(same)[1])
    torch.testing.assert_close(tokens(swapped), tokens(same).flip(0))
    places = [clip.alignment.keypoints[0, :, 0, 0] for clip in (same, swapped)]
    np.testing.assert_allclose(places[0], [0.25, 0.75], atol=0.05)
    np.testing.assert_allclose(places[1], [0.75, 0.25], atol=0.05)
    for x in (0.25, 0.75):  # whoever moves them, the people of the picture keep their faces
        before, after = tokens(same)[region(same, x)], tokens(swapped)[region(swapped, x)]
        torch.testing.assert_close(before, after)


def test_tracks_that_are_not_aligned_change_faces_where_they_are(
    pipeline: AnimationPipeline,
) -> None:
    same, frames = animate(pipeline, 1, 2, align=False)
    swapped, other = animate(pipeline, 2, 1, align=False)
    assert np.array_equal(same.alignment.keypoints, swapped.alignment.keypoints)
    for x in (0.25, 0.75):
        assert region(same, x) == region(swapped, x)
    torch.testing.assert_close(tokens(swapped), tokens(same).flip(0))
    assert not np.array_equal(frames, other)


def test_a_person_without_a_face_of_their_own_gets_nobodys(pipeline: AnimationPipeline) -> None:
    clip, _ = animate(pipeline, faces=(RIGHT,))
    nobody = pipeline._encode(picture(), [None], clip.framing, 0).context[0, 1:]
    torch.testing.assert_close(tokens(clip)[region(clip, 0.25)], nobody)


def test_one_person_in_the_clip_is_animated_as_ever(pipeline: AnimationPipeline) -> None:
    clip, _ = animate(pipeline, driving=(0.5,))
    assert clip.conditions.regions is None
    assert len(tokens(clip)) == 1


def test_whoever_becomes_nobody_of_the_picture_is_left_out_unless_asked_for(
    pipeline: AnimationPipeline,
) -> None:
    def frames(*driving: float, others: bool = False) -> np.ndarray:
        alignment = AlignmentSettings(others=others)
        return pipeline(
            picture(),
            pose(0.25),
            pose(*driving, frames=FRAMES),
            fps=10.0,
            face=LEFT,
            align=False,
            size=(SIDE, SIDE),
            settings=replace(pipeline.settings, alignment=alignment),
        ).frames

    alone = frames(0.25)
    assert np.array_equal(frames(0.25, 0.75), alone)
    assert not np.array_equal(frames(0.25, 0.75, others=True), alone)


@pytest.mark.parametrize("people", [(1,), (1, 1), (2, 3)])
def test_an_order_of_other_people_is_refused(
    pipeline: AnimationPipeline, people: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="the numbers 1 to 2 in some order"):
        animate(pipeline, *people)


def test_faces_go_to_the_nearest_head_and_stray_ones_to_nobody() -> None:
    people = pose(0.75, 0.25)
    stray = Face(box=np.array([0.45, 0.9, 0.5, 0.95], np.float32), score=0.9)
    found = faces_of_people(people.keypoints, people.score, [stray, LEFT, RIGHT], None, 0.3)
    assert found[0] is RIGHT
    assert found[1] is LEFT
    assert len(found) == 2
    unseen = np.where(np.arange(2)[:, None] == 1, 0, people.score)
    assert set(faces_of_people(people.keypoints, unseen, [LEFT, RIGHT], RIGHT, 0.3)) == {0}


def test_a_face_is_one_persons_also_where_another_unsure_head_lies_on_it() -> None:
    people = pose(0.75, 0.25)
    keypoints, score = people.keypoints.copy(), people.score.copy()
    keypoints[1] = keypoints[0]
    twin = Face(box=RIGHT.box + 0.01, score=0.8)  # the main face, found once more
    found = faces_of_people(keypoints, score, [twin, LEFT], RIGHT, 0.3)
    assert set(found) == {0}
    score[1] = 0.1
    assert set(faces_of_people(keypoints, score, [twin], None, 0.3)) == {0}
