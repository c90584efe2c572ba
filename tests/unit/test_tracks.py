"""From sampled frames to tracks over a clip: interpolation, linking, whose face it is."""

import numpy as np
import pytest

from pipelines.curation.frames import FrameStream
from pipelines.curation.tracks import FaceLinker, match_boxes, spread_keyframes
from pipelines.faces import Face
from pipelines.pose import PoseTrack
from pipelines.video import VideoError, encode


def face(x: float, y: float = 0.1, score: float = 0.9) -> Face:
    box = np.array([x, y, x + 0.1, y + 0.1], np.float32)
    return Face(box=box, score=score, landmarks=np.full((5, 2), x, np.float32))


def pose_with_heads(*places: float, frames: int) -> PoseTrack:
    """People whose noses are at (x + 0.05, 0.15)."""
    people = len(places)
    keypoints = np.zeros((frames, people, 18, 2), np.float32)
    keypoints[:, :, 0] = [[x + 0.05, 0.15] for x in places]
    score = np.zeros((frames, people, 18), np.float32)
    score[:, :, 0] = 0.9
    return PoseTrack(keypoints=keypoints, score=score, boxes=np.zeros((frames, people, 4)))


def linked(frames: dict[int, list[Face]], num_frames: int, pose: PoseTrack):
    linker = FaceLinker(max_people=4)
    for index, faces in frames.items():
        linker.add(index, [(one, None) for one in faces])
    return linker.track(num_frames, pose, "test", "rgb")


def test_faces_move_in_a_line_between_samples_and_hold_to_the_end():
    track = linked({0: [face(0.1)], 4: [face(0.14)]}, 7, PoseTrack.empty(7))
    expected = [0.1, 0.11, 0.12, 0.13, 0.14, 0.14, 0.14]
    np.testing.assert_allclose(track.boxes[:, 0, 0], expected, atol=1e-6)
    np.testing.assert_allclose(track.landmarks[:, 0, 2, 0], expected, atol=1e-6)


def test_face_that_is_lost_leaves_zeros():
    track = linked({0: [face(0.1)], 2: [], 4: [face(0.1)]}, 6, PoseTrack.empty(6))
    assert (track.score[:, 0] > 0).tolist() == [True, False, False, False, True, True]
    assert not track.boxes[1:4].any()


def test_two_faces_keep_their_places_whatever_their_order():
    left, right = face(0.1), face(0.7)
    track = linked({0: [left, right], 2: [right, left]}, 3, PoseTrack.empty(3))
    assert track.boxes.shape == (3, 2, 4)
    for person in range(2):
        assert np.ptp(track.boxes[:, person, 0]) < 1e-6


def test_face_belongs_to_the_person_with_that_head():
    pose = pose_with_heads(0.7, 0.1, frames=3)
    track = linked({0: [face(0.1), face(0.7)], 2: [face(0.1), face(0.7)]}, 3, pose)
    np.testing.assert_allclose(track.boxes[0, :, 0], [0.7, 0.1], atol=1e-6)


def test_face_that_jumps_stays_with_the_head_under_it():
    pose = pose_with_heads(0.1, frames=4)
    pose.keypoints[2:, 0, 0] = (0.65, 0.15)
    track = linked({0: [face(0.1)], 2: [face(0.6)]}, 4, pose)
    assert track.boxes.shape == (4, 1, 4)
    np.testing.assert_allclose(track.boxes[[0, 2], 0, 0], [0.1, 0.6], atol=1e-6)


def test_face_of_nobody_that_is_seen_once_is_dropped():
    pose = pose_with_heads(0.7, frames=3)
    track = linked({0: [face(0.7)], 1: [face(0.7), face(0.2)], 2: [face(0.7)]}, 3, pose)
    assert track.boxes.shape == (3, 1, 4)


def test_face_of_nobody_takes_no_persons_place():
    pose = pose_with_heads(0.7, frames=2)
    track = linked({0: [face(0.1)], 1: [face(0.1)]}, 2, pose)
    assert track.boxes.shape == (2, 2, 4)
    assert not track.boxes[:, 0].any()


def test_joints_between_keyframes_are_interpolated_only_if_both_are_seen():
    keypoints = np.zeros((2, 1, 18, 2), np.float32)
    keypoints[1] = 0.4
    score = np.full((2, 1, 18), 0.9, np.float32)
    score[0, 0, 5] = 0.0
    track = PoseTrack(keypoints=keypoints, score=score, boxes=np.zeros((2, 1, 4), np.float32))
    spread = spread_keyframes(track, np.array([0, 4]), 6)
    np.testing.assert_allclose(spread.keypoints[:, 0, 0, 0], [0, 0.1, 0.2, 0.3, 0.4, 0.4])
    np.testing.assert_allclose(spread.score[:, 0, 5], [0, 0, 0.9, 0.9, 0.9, 0.9])


def test_boxes_match_by_greatest_overlap():
    boxes = np.array([[0, 0, 1, 1], [0.5, 0.5, 1, 1]], np.float32)
    others = np.array([[0.5, 0.5, 1, 1], [0, 0, 0.9, 0.9], [0, 0, 0, 0]], np.float32)
    assert match_boxes(boxes, others) == {0: 1, 1: 0}


def test_stream_gives_the_frames_of_any_reading_order(tmp_path):
    frames = [np.full((32, 32, 3), 10 * index, np.uint8) for index in range(20)]
    encode(tmp_path / "a.mp4", frames, fps=10)
    stream = FrameStream(tmp_path / "a.mp4", 10, 20, every=3)

    def level(frame: np.ndarray) -> int:
        return round(float(frame.mean()) / 10)

    assert len(stream) == 7
    assert [level(frame) for frame in stream] == [0, 3, 6, 9, 12, 15, 18]
    assert [level(frame) for frame in stream[2:5]] == [6, 9, 12]
    assert level(stream[0]) == 0
    assert level(stream[-1]) == 18
    with pytest.raises(VideoError, match="ends before frame"):
        FrameStream(tmp_path / "a.mp4", 10, 30)[29]
