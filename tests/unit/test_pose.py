"""Keypoints: decoding of both kinds of heads, linking, files, and the real small networks."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from skimage.data import astronaut

from animator.keypoints import (
    BODY,
    FACE,
    LEFT_HAND,
    NUM_KEYPOINTS,
    RIGHT_HAND,
    VISIBLE,
    WHOLE_BODY,
)
from pipelines.pose import (
    Person,
    PoseError,
    PoseTrack,
    boxes_around,
    calibrate,
    link_people,
    without_outside,
)
from pipelines.pose_backends import open_pose_backend
from pipelines.pose_onnx import (
    BATCH,
    COCO18_FROM_COCO17,
    NECK,
    OnnxPoseBackend,
    PoseNetwork,
    coco18,
    crop_region,
    decode_heatmaps,
    decode_simcc,
)
from pipelines.video import decode, encode, probe

HEIGHT, WIDTH = 384, 288


def _person(x: float, y: float, size: float = 0.2, score: float = 0.9) -> Person:
    box = np.array([x, y, x + size, y + size], np.float32)
    points = np.tile((box[:2] + box[2:]) / 2, (NUM_KEYPOINTS, 1)).astype(np.float32)
    return Person(keypoints=points, score=np.full(NUM_KEYPOINTS, score, np.float32), box=box)


def _whole_person(x: float, y: float, size: float = 0.2) -> Person:
    """A person whose hands and face nobody sees."""
    body = _person(x, y, size)
    unseen = WHOLE_BODY - NUM_KEYPOINTS
    points = np.pad(body.keypoints, [(0, unseen), (0, 0)])
    return Person(keypoints=points, score=np.pad(body.score, (0, unseen)), box=body.box)


def _simcc_model(path: Path, batch: int | str = "N", joints: int = 133) -> Path:
    """DWPose's inputs and outputs: each joint's vector is the brightness of the crop's columns and
    rows, so its peak is where a bright dot lies."""
    nodes = [
        helper.make_node("ReduceMax", ["input", "yes"], ["columns"], keepdims=0),
        helper.make_node("ReduceMax", ["input", "xes"], ["rows"], keepdims=0),
    ]
    constants = [
        numpy_helper.from_array(np.array([1, 2], np.int64), "yes"),
        numpy_helper.from_array(np.array([1, 3], np.int64), "xes"),
    ]
    for name, side, output in (("columns", WIDTH, "simcc_x"), ("rows", HEIGHT, "simcc_y")):
        # One pixel to its first of two bins, for each of the points, scaled below one.
        spread = np.zeros((side, 2 * side), np.float32)
        spread[np.arange(side), 2 * np.arange(side)] = 0.3
        constants.append(numpy_helper.from_array(spread, f"{name}_bins"))
        constants.append(
            numpy_helper.from_array(np.ones((joints, 1), np.float32), f"{name}_joints")
        )
        constants.append(numpy_helper.from_array(np.array([1], np.int64), f"{name}_axis"))
        nodes += [
            helper.make_node("MatMul", [name, f"{name}_bins"], [f"{name}_all"]),
            helper.make_node("Unsqueeze", [f"{name}_all", f"{name}_axis"], [f"{name}_one"]),
            helper.make_node("MatMul", [f"{name}_joints", f"{name}_one"], [output]),
        ]
    graph = helper.make_graph(
        nodes,
        "simcc",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, HEIGHT, WIDTH])],
        [
            helper.make_tensor_value_info("simcc_x", TensorProto.FLOAT, [batch, joints, 2 * WIDTH]),
            helper.make_tensor_value_info(
                "simcc_y", TensorProto.FLOAT, [batch, joints, 2 * HEIGHT]
            ),
        ],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


def _dot(x: int, y: int) -> np.ndarray:
    frame = np.zeros((200, 300, 3), np.uint8)
    frame[y - 2 : y + 3, x - 2 : x + 3] = 255
    return frame


@pytest.mark.parametrize(("batch", "joints", "kept"), [("N", 133, 133), (1, 17, 17), ("N", 26, 17)])
def test_simcc_network_finds_a_dot_in_every_crop_of_a_large_batch(tmp_path, batch, joints, kept):
    network = PoseNetwork(_simcc_model(tmp_path / "dwpose.onnx", batch, joints), threads=1)
    assert network.head == "simcc"
    dots = [(60 + 5 * index, 40 + 3 * index) for index in range(BATCH + 5)]
    crops = [(_dot(x, y), np.array([x - 40, y - 30, x + 50, y + 60], np.float32)) for x, y in dots]
    points, score = network.estimate(crops)
    assert points.shape == (BATCH + 5, kept, 2)
    assert np.abs(points - np.array(dots)[:, None]).max() < 3.5
    assert ((score > VISIBLE) & (score <= 1)).all()


def _answering_model(path: Path, size: tuple[int, int], outputs: dict[str, np.ndarray]) -> Path:
    """A network that answers every picture with the same outputs."""
    source = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, *size])
    constants = [numpy_helper.from_array(np.zeros(1, np.float32), "zero")]
    nodes = [
        helper.make_node("ReduceMax", ["input"], ["peak"], keepdims=0),
        helper.make_node("Mul", ["peak", "zero"], ["nothing"]),
    ]
    for name, value in outputs.items():
        constants.append(numpy_helper.from_array(value.astype(np.float32), f"{name}_value"))
        nodes.append(helper.make_node("Add", [f"{name}_value", "nothing"], [name]))
    targets = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape)
        for name, value in outputs.items()
    ]
    graph = helper.make_graph(nodes, "answer", [source], targets, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


def _detector_model(path: Path) -> Path:
    """YOLOX's inputs and outputs; one person over the middle half of a square picture."""
    answer = np.zeros((1, 84, 85))  # 64 cells of 8 pixels, 16 of 16, 4 of 32
    # The corner of the last cell of 32 pixels is the middle; e^0 is its size.
    answer[0, -1, [4, 5]] = 0.95
    return _answering_model(path, (64, 64), {"output": answer})


def test_whole_body_head_gives_body_hands_and_face_in_our_order(tmp_path: Path):
    # Every point of the network lies on a line of its own, so that its place tells its number.
    along_x, along_y = np.zeros((1, 133, 2 * WIDTH)), np.zeros((1, 133, 2 * HEIGHT))
    numbers = np.arange(133)
    along_x[0, numbers, 20 + 4 * numbers] = 0.9
    along_y[0, numbers, HEIGHT] = 0.9
    along_x[0, 60] *= 0.1  # one point of the face that the network does not see
    vectors = {"simcc_x": along_x, "simcc_y": along_y}
    backend = OnnxPoseBackend(
        _detector_model(tmp_path / "yolox.onnx"),
        _answering_model(tmp_path / "dwpose.onnx", (HEIGHT, WIDTH), vectors),
        threads=1,
    )
    frames = [np.zeros((640, 640, 3), np.uint8)] * 2
    track = backend.track(frames)
    assert track.keypoints.shape == (2, 1, 128, 2)
    np.testing.assert_allclose(track.boxes[0, 0], [0.25, 0.25, 0.75, 0.75], atol=1e-6)
    left, _, width, _ = crop_region(np.array([160.0, 160, 480, 480]), (HEIGHT, WIDTH)) / 640
    found = ((track.keypoints[0, 0, :, 0] - left) / width * 2 * WIDTH - 20) / 4
    seen = track.score[0, 0] > 0.8
    expected = np.array([*COCO18_FROM_COCO17, *range(91, 112), *range(112, 133), *range(23, 91)])
    expected = np.where(np.arange(128) == NECK, 5.5, expected)  # between the shoulders, 5 and 6
    np.testing.assert_allclose(found[seen], expected[seen], atol=0.01)
    assert np.flatnonzero(~seen).tolist() == [FACE.start + 60 - 23]


def test_network_of_other_outputs_is_refused(tmp_path: Path):
    (tmp_path / "text.onnx").write_text("no network")
    with pytest.raises(PoseError, match="fetch it again"):
        PoseNetwork(tmp_path / "text.onnx")
    graph = helper.make_graph(
        [helper.make_node("Identity", ["a"], ["b"])],
        "same",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [1, 3, 8])],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, [1, 3, 8])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(tmp_path / "same.onnx"))
    with pytest.raises(PoseError, match=r"expected \(N, 3, H, W\)"):
        PoseNetwork(tmp_path / "same.onnx")


def test_heatmap_peak_is_refined_towards_the_higher_neighbour():
    maps = np.zeros((1, 2, 64, 48), np.float32)
    maps[0, 0, 20, 10], maps[0, 0, 20, 11], maps[0, 0, 19, 10] = 0.8, 0.5, 0.4
    maps[0, 1, 0, 47] = 0.6  # in a corner
    place, score = decode_heatmaps(maps)
    np.testing.assert_allclose(place[0, 0] * [48, 64], [10.25, 19.75])
    assert (place[0, 1] * [48, 64]).round() == pytest.approx([47, 0])
    np.testing.assert_allclose(score, [[0.8, 0.6]])


def test_simcc_score_is_that_of_the_less_certain_axis():
    along_x, along_y = np.zeros((1, 1, 8)), np.zeros((1, 1, 16))
    along_x[0, 0, 2], along_y[0, 0, 12] = 0.9, 0.4
    place, score = decode_simcc(along_x, along_y)
    np.testing.assert_allclose(place[0, 0], [0.25, 0.75])
    assert score[0, 0] == pytest.approx(0.4)


def test_neck_lies_between_the_shoulders_and_is_as_sure_as_the_worse():
    points = np.arange(34, dtype=np.float32).reshape(1, 17, 2)
    score = np.full((1, 17), 0.8, np.float32)
    score[0, 6] = 0
    body, certainty = coco18(points, score)
    np.testing.assert_allclose(body[0, NECK], points[0, [5, 6]].mean(0))
    assert certainty[0, NECK] == 0
    np.testing.assert_allclose(body[0, 2], points[0, 6])  # right shoulder
    assert sorted({*COCO18_FROM_COCO17}) == list(range(17))


def test_crop_keeps_the_box_centre_and_the_network_aspect():
    region = crop_region(np.array([100.0, 50, 140, 250]), (256, 192))
    assert region[2] / region[3] == pytest.approx(192 / 256)
    np.testing.assert_allclose(region[:2] + region[2:] / 2, [120, 150])
    assert region[3] == pytest.approx(1.25 * 200)


def test_joint_outside_the_frame_is_missing():
    points = np.array([[0.5, 0.5], [1.01, 0.5], [np.nan, 0.5], [0.2, -0.1]], np.float32)
    kept, score = without_outside(points, np.full(4, 0.9, np.float32))
    np.testing.assert_allclose(score, [0.9, 0, 0, 0])
    assert np.isfinite(kept).all()


def test_calibration_puts_every_network_on_one_threshold():
    np.testing.assert_allclose(calibrate(np.array([0, 0.25, 0.5, 1]), 0.5), [0, 0.15, VISIBLE, 1])


def test_people_keep_their_track_through_a_gap_and_the_larger_comes_first():
    frames = [[_person(0.1, 0.1), _person(0.6 - 0.01 * i, 0.3, 0.35)] for i in range(10)]
    frames[4] = frames[4][::-1]
    frames[5] = [frames[5][1]]
    track = link_people(frames)
    assert track.keypoints.shape == (10, 2, 18, 2)
    np.testing.assert_allclose(track.boxes[:, 0, 0], 0.6 - 0.01 * np.arange(10), atol=1e-6)
    assert not track.boxes[5, 1].any()
    assert track.score[6, 1].all()
    assert track.missing_share() == 0
    assert track.missing_share(person=1) == pytest.approx(0.1)
    assert track.missing_share(person=2) == 1


def test_somebody_fast_keeps_the_track_out_of_the_last_box():
    frames = [[_person(0.14 * index, 0.4)] for index in range(6)]
    assert link_people(frames).num_people == 1
    jump = [[_person(0.0, 0.4)], [_person(0.6, 0.4)]]
    assert link_people(jump).num_people == 2


def test_people_who_pass_each_other_keep_their_tracks():
    steps = np.arange(9) * 0.1
    frames = [[_person(x, 0.4), _person(0.8 - x, 0.42)] for x in steps.astype(float)]
    track = link_people(frames)
    assert track.num_people == 2
    for person in range(2):
        moves = np.diff(track.boxes[:, person, 0])
        assert (np.sign(moves) == np.sign(moves[0])).all()


def test_somebody_lost_for_long_is_found_again_at_the_same_place():
    frames = [[_person(0.4, 0.4)]] * 10 + [[]] * 15 + [[_person(0.42, 0.4)]] * 10
    assert link_people(frames).num_people == 1
    hardly_seen = [[_person(0.4, 0.4)]] * 2 + [[]] * 15 + [[_person(0.42, 0.4)]] * 2
    assert link_people(hardly_seen).num_people == 2


def test_somebody_who_leaves_by_an_edge_comes_back_by_it():
    leaving = [[_person(0.3 - 0.05 * index, 0.4)] for index in range(7)]
    back = [[_person(0.05 * index, 0.7)] for index in range(7)]
    assert link_people([*leaving, *[[]] * 10, *back]).num_people == 1
    other_side = [[_person(0.8 - 0.05 * index, 0.7)] for index in range(7)]
    assert link_people([*leaving, *[[]] * 10, *other_side]).num_people == 2


def test_of_two_who_left_by_an_edge_nobody_knows_who_comes_back():
    leaving = [
        [_person(0.3 - 0.05 * index, 0.1), _person(0.3 - 0.05 * index, 0.7)] for index in range(7)
    ]
    back = [[_person(0.05 * index, 0.4)] for index in range(7)]
    assert link_people([*leaving, *[[]] * 10, *back]).num_people == 3


def test_hands_and_face_out_of_sight_do_not_count_as_missing_body():
    track = link_people([[], [_whole_person(0.1, 0.1)], [_whole_person(0.1, 0.1)]])
    assert track.keypoints.shape == (3, 1, 128, 2)
    assert track.main(1)[1].shape == (3, 128)
    assert track.missing_share() == pytest.approx(1 / 3)


def test_clip_of_nobody_is_a_track_of_no_people():
    track = link_people([[], []])
    assert track.keypoints.shape == (2, 0, 18, 2)
    points, score = track.main()
    assert points.shape == (2, 18, 2)
    assert not score.any()
    assert track.missing_share() == 1


def test_box_around_no_visible_joint_is_empty():
    points = np.array([[[0.2, 0.4], [0.4, 0.6]], [[0.3, 0.3], [0.3, 0.3]]], np.float32)
    boxes = boxes_around(points, np.array([[0.9, 0.9], [0.1, 0.1]]))
    np.testing.assert_allclose(boxes, [[0.19, 0.39, 0.41, 0.61], [0, 0, 0, 0]], atol=1e-6)


def test_box_is_of_the_body_alone():
    person = _whole_person(0.4, 0.4)
    person.keypoints[FACE], person.score[FACE] = 0.1, 1
    np.testing.assert_allclose(boxes_around(person.keypoints, person.score), 0.5, atol=1e-6)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    encode(tmp_path / "dance.mp4", [astronaut()[:64, :64]] * 20, fps=10)
    return tmp_path / "dance.mp4"


def _track(frames: int) -> dict[str, Any]:
    people = [[_person(0.01 * index, 0.1, 0.5)] for index in range(frames)]
    track = link_people(people)
    return {"keypoints": track.keypoints, "score": track.score, "boxes": track.boxes}


def test_keypoints_beside_the_video_are_taken_at_the_times_of_the_frames(clip, no_models):
    arrays = _track(20)
    np.savez(clip.with_name("dance.pose.npz"), **arrays, fps=10.0)
    backend = open_pose_backend("auto")
    times = np.array([0.0, 0.5, 1.04, 1.9, 5.0])
    track = backend.track([np.zeros((64, 64, 3), np.uint8)] * 5, source=clip, times=times)
    np.testing.assert_allclose(track.keypoints[:4], arrays["keypoints"][[0, 5, 10, 19]])
    assert track.missing_share() == pytest.approx(0.2)  # the file ends before the last time
    assert "dance.pose.npz" in track.backend


def test_dwpose_arrays_of_indices_are_read(clip, no_models):
    candidate = np.random.default_rng(0).uniform(0.1, 0.9, (20, 18, 2)).astype(np.float32)
    subset = np.tile(np.arange(18, dtype=np.float32), (20, 1, 1))
    subset[:, :, 4] = -1
    np.savez(clip.with_name("dance.dwpose.npz"), candidate=candidate, subset=subset)
    track = open_pose_backend("file").track([], source=clip, times=np.zeros(0))
    assert track.keypoints.shape == (0, 1, 18, 2)
    frames = [np.zeros((8, 8, 3), np.uint8)] * 20
    track = open_pose_backend("file").track(frames, source=clip, times=np.arange(20) / 10)
    assert (track.score[:, 0, 0] >= VISIBLE).all()  # index 0 is the nose, not a missing joint
    assert not track.score[:, 0, 4].any()
    np.testing.assert_allclose(track.keypoints[:, 0, 5], candidate[:, 5])


def test_dwpose_hands_and_faces_of_every_person_are_read(clip, no_models):
    rng = np.random.default_rng(0)
    candidate = rng.uniform(0.1, 0.9, (20, 2 * 18, 2))
    subset = np.tile(np.arange(36.0).reshape(2, 18), (20, 1, 1))
    hands, faces = rng.uniform(0.1, 0.9, (20, 4, 21, 2)), rng.uniform(0.1, 0.9, (20, 2, 68, 2))
    candidate[:, 18:] = 0.5 + (candidate[:, 18:] - 0.5) / 2  # the second person is smaller
    hands[:, 1, 4] = -1
    arrays = {"candidate": candidate, "subset": subset}
    frames = [np.zeros((8, 8, 3), np.uint8)] * 20
    path = clip.with_name("dance.dwpose.npz")
    np.savez(path, **arrays, hands=hands, faces=faces)
    track = open_pose_backend("file").track(frames, source=clip)
    assert track.keypoints.shape == (20, 2, 128, 2)
    for person in range(2):
        points = track.keypoints[:, person]
        np.testing.assert_allclose(points[:, BODY], candidate.reshape(20, 2, 18, 2)[:, person])
        np.testing.assert_allclose(points[:, RIGHT_HAND], hands[:, 2 + person])
        np.testing.assert_allclose(points[:, FACE], faces[:, person])
    np.testing.assert_allclose(track.keypoints[:, 0, LEFT_HAND], hands[:, 0])
    thumb = LEFT_HAND.start + 4
    assert not track.score[:, 1, thumb].any()
    assert (np.delete(track.score[:, 1], thumb, 1) == 1).all()
    np.savez(path, **arrays, faces=faces)
    handless = open_pose_backend("file").track(frames, source=clip)
    assert not handless.score[:, :, LEFT_HAND].any()
    assert handless.score[:, :, FACE].all()
    np.savez(path, **arrays, hands=hands[:, :2])
    with pytest.raises(PoseError, match=r"hands is \(20, 2, 21, 2\), expected \(20, 4, 21, 2\)"):
        open_pose_backend("file").track(frames, source=clip)


@pytest.mark.parametrize(("given", "kept"), [(18, 18), (128, 128), (133, 18), (25, 18)])
def test_keypoints_of_a_file_are_a_body_or_a_whole_body(clip, no_models, given: int, kept: int):
    points = np.random.default_rng(0).uniform(0.1, 0.9, (20, 1, given, 2)).astype(np.float32)
    score = np.full((20, 1, given), 0.7, np.float32)
    np.savez(clip.with_name("dance.pose.npz"), keypoints=points, score=score)
    track = open_pose_backend("file").track([np.zeros((8, 8, 3), np.uint8)] * 20, source=clip)
    np.testing.assert_array_equal(track.keypoints, points[:, :, :kept])
    np.testing.assert_array_equal(track.score, score[:, :, :kept])


def test_a_rate_that_is_known_saves_opening_the_video(clip, no_models):
    np.savez(clip.with_name("dance.pose.npz"), **_track(20))
    frames, times = [np.zeros((8, 8, 3), np.uint8)] * 5, np.arange(5) / 5
    backend = open_pose_backend("auto")
    rate = probe(clip).fps
    expected = backend.track(frames, source=clip, times=times)
    clip.write_bytes(b"no video at all")
    with pytest.raises(PoseError, match="has no fps"):
        backend.track(frames, source=clip, times=times)
    found = backend.track(frames, source=clip, times=times, rate=rate)
    np.testing.assert_array_equal(found.keypoints, expected.keypoints)


def test_without_models_or_file_there_are_no_people_and_it_says_so(clip, no_models):
    backend = open_pose_backend("auto")
    track = backend.track([np.zeros((64, 64, 3), np.uint8)] * 3, source=clip)
    assert isinstance(track, PoseTrack)
    assert track.num_people == 0
    assert "no pose models" in backend.reason


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"joints": np.zeros(3)}, "expected keypoints and score"),
        ({"keypoints": np.zeros((5, 1, 18, 2)), "score": np.zeros((5, 1, 17))}, "expected"),
        ({"keypoints": np.zeros((5, 1, 18, 3)), "score": np.zeros((5, 1, 18))}, "expected"),
        ({**_track(5), "boxes": np.zeros((5, 4))}, "boxes"),
    ],
)
def test_bad_keypoint_files_are_refused_with_what_was_expected(clip, arrays, message: str):
    np.savez(clip.with_name("dance.pose.npz"), **arrays)
    with pytest.raises(PoseError, match=message):
        open_pose_backend("file").track([np.zeros((8, 8, 3), np.uint8)] * 5, source=clip)


def test_pickles_and_missing_files_are_refused(clip):
    with pytest.raises(PoseError, match=r"NAME\.pose\.npz"):
        open_pose_backend("file").track([], source=clip)
    np.savez(clip.with_name("dance.pose.npz"), keypoints=np.array([{"a": 1}]), score=np.zeros(1))
    with pytest.raises(PoseError, match="not a keypoints file"):
        open_pose_backend("file").track([], source=clip)


@pytest.mark.parametrize("choice", ["onnx", "dwpose"])
def test_missing_pose_models_are_an_error_that_says_where_to_put_them(no_models, choice: str):
    with pytest.raises(PoseError, match="ANIMATOR_MODELS"):
        open_pose_backend(choice)


@pytest.mark.real_data
def test_small_networks_agree_with_dwpose_on_a_fashion_clip(data_root: Path, models_env: Path):
    source = data_root / "pose2d" / "ubc_91BjuE6irxS.mp4"
    info = probe(source)
    frames = list(decode(source, fps=info.fps / 20))[:12]
    times = np.arange(len(frames)) * 20 / info.fps
    expected = open_pose_backend("auto").track(frames, source=source, times=times)
    assert expected.backend.startswith("file")
    found = open_pose_backend("onnx").track(frames)
    assert found.num_people == 1
    size = np.array([info.width, info.height])
    height = (expected.boxes[:, 0, 3] - expected.boxes[:, 0, 1]) * info.height
    places, score = expected.keypoints[:, 0, BODY], expected.score[:, 0, BODY]
    error = np.linalg.norm((found.keypoints[:, 0] - places) * size, axis=-1)
    both = (found.score[:, 0] >= VISIBLE) & (score >= VISIBLE)
    assert both.mean() > 0.95
    assert np.median((error / height[:, None])[both]) < 0.011


@pytest.mark.real_data
def test_hands_and_face_of_real_keypoints_hang_on_the_body(data_root: Path, no_models):
    source = data_root / "pose2d" / "ubc_91-3003CN5S.mp4"
    times = np.arange(0, 11, 0.5)
    frames = [np.zeros((8, 8, 3), np.uint8)] * len(times)
    points, score = open_pose_backend("auto").track(frames, source=source, times=times).main()
    assert points.shape[1] == WHOLE_BODY
    assert (score[:, NUM_KEYPOINTS:] > 0).mean() > 0.98
    nose, right_wrist, left_wrist = points[:, 0], points[:, 4], points[:, 7]
    # A hand begins at its own wrist, the face's tip of the nose is the body's.
    for part, joint in ((LEFT_HAND, left_wrist), (RIGHT_HAND, right_wrist)):
        assert np.median(np.linalg.norm(points[:, part.start] - joint, axis=-1)) < 0.03
    assert np.median(np.linalg.norm(points[:, FACE.start + 30] - nose, axis=-1)) < 0.02


@pytest.mark.real_data
def test_everyone_is_found_and_nobody_where_there_is_nobody(data_root: Path, models_env: Path):
    backend = open_pose_backend("onnx")
    assert isinstance(backend, OnnxPoseBackend)
    two = decode(data_root / "video" / "mmaction2_demo_skeleton.mp4", max_side=960, end=0.2)
    assert [len(people) for people in backend.people(list(two[:2]))] == [2, 2]
    cat = decode(data_root / "video" / "cotracker_cat.mp4", fps=1)
    assert backend.track(list(cat)).num_people == 0


@pytest.mark.real_data
def test_legs_outside_the_frame_are_missing(data_root: Path, models_env: Path):
    frames = decode(data_root / "video" / "liveportrait_s18.mp4", fps=1, end=3, max_side=640)
    _, score = open_pose_backend("onnx").track(list(frames)).main()
    assert (score[:, [9, 10, 12, 13]] < VISIBLE).all()
    assert (score[:, [0, 1, 2, 5]] >= VISIBLE).all()
