"""Motion capture read safely, and the poses that random cameras see of it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from animator.keypoints import LIMBS
from pipelines.draws import normals, uniforms
from pipelines.motion import MotionError, MotionStore
from pipelines.motion_camera import FULL_BODIES, CameraConfig, PoseSampler
from pipelines.npz_files import NpzError

# A person of 1.7 m who faces +z: the left side is at +x.
BODY = np.array(
    [
        *((0, 1.62, 0.1), (0, 1.45, 0)),
        *((-0.18, 1.44, 0), (-0.3, 1.2, 0), (-0.34, 1.0, 0.1)),
        *((0.18, 1.44, 0), (0.3, 1.2, 0), (0.34, 1.0, 0.1)),
        *((-0.1, 0.95, 0), (-0.11, 0.5, 0.02), (-0.12, 0.08, 0)),
        *((0.1, 0.95, 0), (0.11, 0.5, 0.02), (0.12, 0.08, 0)),
        *((-0.03, 1.66, 0.08), (0.03, 1.66, 0.08), (-0.08, 1.64, 0), (0.08, 1.64, 0)),
    ],
    np.float32,
)
# No camera angle, no lens to speak of, nothing random about the person.
PLAIN = dataclasses.replace(
    FULL_BODIES, yaw=(0, 0), pitch=(0, 0), roll=(0, 0), distance=(1e3, 1e3), limbs=0.0, mirror=0.0
)


def dancer(num_frames: int = 90, travel: float = 1.0) -> np.ndarray:
    """A person who swings the right arm and walks to the side; `(T, 18, 3)`."""
    joints = np.repeat(BODY[None], num_frames, 0)
    swing = np.sin(np.linspace(0, 9, num_frames))
    joints[:, 4, 1] += 0.4 * swing
    joints[:, :, 0] += np.linspace(0, travel, num_frames)[:, None]
    return joints


def write_motion(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    arrays: dict = {"joints": dancer(), "fps": np.float32(30), "source": "bandai"} | changes
    np.savez(folder / "walk.npz", **{k: v for k, v in arrays.items() if v is not None})
    return folder


@pytest.fixture
def store(tmp_path: Path) -> MotionStore:
    folder = write_motion(tmp_path / "motion")
    np.savez(folder / "dance.npz", joints=dancer(60, travel=0.0), fps=25.0, licence="CC0")
    return MotionStore(folder)


def test_sequences_come_in_order_with_their_licences(store):
    assert [motion.name for motion in store.motions] == ["dance", "walk"]
    assert [motion.fps for motion in store.motions] == [25, 30]
    assert store.num_frames == 150
    assert store.licences == {"CC BY-NC 4.0 (Bandai-Namco Research Motion Dataset)": 1, "CC0": 1}
    write_motion(store.folder, source=None)
    assert "none stated" in MotionStore(store.folder).licences
    assert "my own" in MotionStore(store.folder, licence="my own").licences


def test_the_fingerprint_follows_names_and_content_alone(store, tmp_path):
    again = tmp_path / "elsewhere"
    again.mkdir()
    for path in store.folder.glob("*.npz"):
        (again / path.name).write_bytes(path.read_bytes())
    assert MotionStore(again).fingerprint == store.fingerprint
    (again / "walk.npz").rename(again / "run.npz")
    assert MotionStore(again).fingerprint != store.fingerprint


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"joints": None}, "expected joints and fps"),
        ({"joints": dancer()[:, :17]}, r"\(T, 18, 3\)"),
        ({"joints": dancer()[:1]}, "at least 2"),
        ({"joints": np.full((5, 18, 3), np.nan, np.float32)}, "NaN"),
        ({"fps": np.float32(0)}, "fps"),
        ({"fps": np.array([30, 30])}, "fps"),
        ({"joints": np.array([{}], dtype=object)}, "cannot be read"),
    ],
)
def test_files_that_are_no_motion_are_named(tmp_path, changes, said):
    folder = write_motion(tmp_path / "motion", **changes)
    with pytest.raises(NpzError, match=said) as error:
        MotionStore(folder)
    assert "walk.npz" in str(error.value)


def test_folders_without_motion_and_torn_files_are_named(tmp_path):
    with pytest.raises(MotionError, match="is no folder"):
        MotionStore(tmp_path / "nowhere")
    with pytest.raises(MotionError, match=r"no \.npz file"):
        MotionStore(tmp_path)
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(NpzError, match=r"torn\.npz"):
        MotionStore(tmp_path)


def test_numbers_of_a_sample_do_not_depend_on_its_batch():
    batch = uniforms(3, range(100, 164), 21, stream=1)
    apart = uniforms(3, [163, 100, 101, 140], 21, stream=1)
    torch.testing.assert_close(apart, batch[[63, 0, 1, 40]], rtol=0, atol=0)
    assert not torch.equal(uniforms(3, [7], 21), uniforms(3, [7], 21, stream=1))
    many = uniforms(0, range(20_000), 10)
    assert 0 < many.min() < 1e-4
    assert 1 - 1e-4 < many.max() < 1
    assert abs(many.mean() - 0.5) < 2e-3
    assert torch.isfinite(normals(many)).all()
    assert abs(normals(many).std() - 1) < 0.01
    # Neighbouring samples have nothing to do with each other.
    assert abs(torch.corrcoef(torch.stack([many[1:, 0], many[:-1, 0]]))[0, 1]) < 0.03


def test_an_example_depends_on_its_number_alone(store):
    sampler = PoseSampler(store, CameraConfig(), seed=1)
    whole = sampler.draw(range(40), 5)
    for field, again in zip(whole, sampler.draw([31, 4, 5], 5), strict=True):
        assert torch.equal(field[[31, 4, 5]], again)
    assert not torch.equal(PoseSampler(store, CameraConfig(), 2).draw([4], 5).points, again)


def test_a_camera_in_front_sees_left_on_the_right_and_the_head_above(store):
    points = PoseSampler(store, PLAIN, 0).draw(range(30), 4).points
    assert (points[:, :, 5, 0] > points[:, :, 2, 0]).all()
    assert (points[:, :, 0, 1] < points[:, :, 10, 1]).all()
    behind = PoseSampler(store, dataclasses.replace(PLAIN, yaw=(180, 180)), 0)
    points = behind.draw(range(30), 4).points
    assert (points[:, :, 5, 0] < points[:, :, 2, 0]).all()
    above = PoseSampler(store, dataclasses.replace(PLAIN, pitch=(60, 60)), 0)
    points = above.draw(range(30), 4).points
    tall = points[:, :, 10, 1] - points[:, :, 1, 1]
    wide = points[:, :, 5, 0] - points[:, :, 2, 0]
    assert (tall / wide < 0.7 * (1.37 / 0.36)).all()


def test_a_mirrored_person_is_a_person_again(store):
    plain = PoseSampler(store, PLAIN, 0).draw(range(8), 6).points
    mirrored = dataclasses.replace(PLAIN, mirror=1.0)
    points = PoseSampler(store, mirrored, 0).draw(range(8), 6).points
    assert (points[:, :, 5, 0] > points[:, :, 2, 0]).all()  # still seen from the front
    swings = points[:, :, :, 1].std(1)
    assert (swings[:, 7] > 5 * swings[:, 4]).all()  # now the left arm does
    assert (plain[:, :, :, 1].std(1)[:, 4] > 0.01).all()


def test_limbs_change_length_in_pairs(store):
    changed = PoseSampler(store, dataclasses.replace(PLAIN, limbs=0.3), 0).draw(range(40), 2)

    def length(points: torch.Tensor, a: int, b: int) -> torch.Tensor:
        return (points[:, :, a] - points[:, :, b]).norm(dim=-1).mean(1)

    legs = [length(changed.points, *bone) for bone in ((8, 9), (11, 12), (9, 10))]
    torch.testing.assert_close(legs[0], legs[1], rtol=1e-3, atol=0)
    assert (legs[0] / legs[2]).std() > 0.1
    joined = {joint for bone in LIMBS for joint in bone}
    assert joined == set(range(18))  # every joint hangs on the tree


def test_full_bodies_are_seen_whole_and_keep_their_place(store):
    clips = PoseSampler(store, FULL_BODIES, 0).draw(range(300), 12)
    assert clips.inside.all()
    assert (clips.score == 1).all()
    assert torch.equal(clips.points, clips.observed)
    assert (clips.size.amax(1) == 1).all()
    shape = clips.size[:, 1] / clips.size[:, 0]
    assert shape.min() < 0.7
    assert shape.max() > 1.5
    centre = clips.points.mean(2)
    travel = (centre - centre.mean(1, keepdim=True)).square().sum(-1).mean(1).sqrt()
    assert travel.max() < 0.0601
    assert travel.max() > 0.03


def test_people_walk_through_the_frame_where_they_may(store):
    config = dataclasses.replace(FULL_BODIES, walk=1.0, yaw=(0, 0), span=(6, 6))
    clips = PoseSampler(store, config, 0).draw(range(100), 12)
    centre = clips.points.mean(2)[..., 0]
    assert (centre.amax(1) - centre.amin(1)).max() > 0.4
    assert not clips.inside.all()
    assert (clips.score[~clips.inside] == 0).all()


def test_half_bodies_show_the_head_and_not_the_feet(store):
    config = dataclasses.replace(FULL_BODIES, full_body=0.0, body=(0.3, 0.5), pitch=(0, 0))
    clips = PoseSampler(store, config, 0).draw(range(200), 4)
    assert clips.inside[:, :, 1].float().mean() > 0.95  # the neck
    assert clips.inside[:, :, [10, 13]].float().mean() < 0.02


def test_detectors_miss_joints_and_are_less_sure_of_noisy_ones(store):
    config = dataclasses.replace(
        FULL_BODIES, perfect=0.0, hide_joints=0.3, hide_parts=0.0, noise=0.02
    )
    clips = PoseSampler(store, config, 0).draw(range(400), 3)
    assert abs((clips.score == 0).float().mean() - 0.3) < 0.02
    error = (clips.observed - clips.points).norm(dim=-1)
    tall = (clips.points[..., 1].amax(2) - clips.points[..., 1].amin(2))[..., None]
    error = error / tall
    seen = clips.score > 0
    assert 0.01 < error.mean() < 0.05
    sure = clips.score > 0.8
    assert error[seen & sure].mean() < 0.8 * error[seen & ~sure].mean()
    parts = dataclasses.replace(config, hide_joints=0.0, hide_parts=0.5)
    arm = PoseSampler(store, parts, 0).draw(range(200), 3).score[:, :, [3, 4]] == 0
    assert (arm == arm[:, :1, :1]).all()
    assert 0.4 < arm.float().mean() < 0.6


def test_chosen_frames_are_those_of_the_whole_clip(store):
    sampler = PoseSampler(store, CameraConfig(walk=0.0), 0)
    keep = torch.tensor([[0, 3], [7, 1]])
    whole = sampler.draw([5, 6], 8)
    chosen = sampler.draw([5, 6], 8, keep=keep)
    for i in range(2):
        assert torch.equal(chosen.points[i], whole.points[i, keep[i]])


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="aspect"):
        CameraConfig(aspect=(2.0, 0.5))
    with pytest.raises(ValueError, match="hide_joints"):
        CameraConfig(hide_joints=1.5)
    with pytest.raises(ValueError, match="strip"):
        CameraConfig(strip=(0.5, 0.5))


@pytest.mark.real_data
def test_real_motion_gives_whole_people(data_root):
    store = MotionStore(data_root / "motion" / "val")
    assert len(store) == 15
    assert set(store.licences) == {
        "CC BY-NC 4.0 (Bandai-Namco Research Motion Dataset)",
        "none stated",
    }
    clips = PoseSampler(store, FULL_BODIES, 0).draw(range(300), 10)
    assert clips.inside.all()
    assert torch.isfinite(clips.points).all()
    tall = (clips.points[..., 1].amax(2) - clips.points[..., 1].amin(2)).mean(1)
    assert 0.2 < tall.min()
    assert tall.max() < 1
