"""Faces optimised in a whole run: on by default where the model knows faces, and in the record."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import astronaut

from animator.keypoints import KEYPOINT_NAMES, NUM_KEYPOINTS
from animator.model import Animator
from animator.weights import save_model
from inference.engine import AnimationEngine
from inference.requests import AnimationRequest
from pipelines.video import encode
from tests.unit.test_tasks import SMALL

FRAMES, FPS = 6, 10.0
# The portrait's joints, in pixels of its 512 x 512.
JOINTS = {
    "nose": (224, 127),
    "neck": (225, 200),
    "right_shoulder": (130, 240),
    "left_shoulder": (330, 240),
    "right_eye": (204, 106),
    "left_eye": (242, 104),
    "right_ear": (185, 112),
    "left_ear": (265, 110),
}


def pose() -> tuple[np.ndarray, np.ndarray]:
    keypoints = np.zeros((1, 1, NUM_KEYPOINTS, 2), np.float32)
    score = np.zeros((1, 1, NUM_KEYPOINTS), np.float32)
    for name, place in JOINTS.items():
        keypoints[..., KEYPOINT_NAMES.index(name), :] = np.array(place) / 512
        score[..., KEYPOINT_NAMES.index(name)] = 1
    return keypoints, score


@pytest.fixture
def request_(tmp_path: Path) -> AnimationRequest:
    """The portrait, driven by its own pose, a little to the side in every frame."""
    keypoints, score = pose()
    Image.fromarray(astronaut()).save(tmp_path / "person.png")
    np.savez(tmp_path / "person.pose.npz", keypoints=keypoints, score=score, fps=FPS)
    frames = [np.full((128, 128, 3), 40 * t, np.uint8) for t in range(FRAMES)]
    encode(tmp_path / "dance.mp4", frames, fps=FPS)
    moved = np.concatenate([keypoints + np.array([0.002 * t, 0]) for t in range(FRAMES)]).astype(
        np.float32
    )
    np.savez(tmp_path / "dance.pose.npz", keypoints=moved, score=score.repeat(FRAMES, 0), fps=FPS)
    output = tmp_path / "out.mp4"
    return AnimationRequest(
        reference=tmp_path / "person.png", driving=tmp_path / "dance.mp4", output=output
    )


def saved_model(folder: Path, *, knows_faces: bool) -> Path:
    torch.manual_seed(0)
    config = SMALL
    if knows_faces:
        config = dataclasses.replace(SMALL, face_embedding="insightface", face_embedding_dim=128)
    config = dataclasses.replace(config, height=128, width=128)
    save_model(
        folder,
        animator=(config, Animator(config).state_dict()),
        about={
            "sampling": {"steps": 3, "sigma_min": 0.05, "sigma_max": 20.0},
            "face_optimization": {"steps": 2, "iterations": 4, "min_face": 8},
        },
    )
    return folder


@pytest.mark.real_data
def test_faces_are_optimised_and_recorded(
    request_: AnimationRequest, tmp_path: Path, models_env: Path
):
    model = saved_model(tmp_path / "model", knows_faces=True)
    record = AnimationEngine(model).run(request_)
    done = record["face_optimization"]
    assert done["settings"]["mode"] == "crop"
    assert done["frames_with_face"] == FRAMES
    assert [step["step"] for step in done["steps"]] == [0, 1]
    assert all(step["loss"][-1] < step["loss"][0] for step in done["steps"])
    assert done["similarity_last"] > done["similarity_first"]
    assert json.loads(request_.output.with_suffix(".json").read_text()) == record
    assert not any("faces are not optimised" in text for text in record["warnings"])
    digest = record["file"]["sha256"]
    assert AnimationEngine(model).run(request_)["file"]["sha256"] == digest

    without = AnimationEngine(model, changes=["face.mode=off"]).run(request_)
    assert "face_optimization" not in without
    assert without["file"]["sha256"] != digest

    small = AnimationEngine(model, changes=["face.min_face=4000"]).run(request_)
    assert any("4000 pixels" in text for text in small["warnings"])


def test_models_without_a_recognition_network_leave_faces_alone(
    request_: AnimationRequest, tmp_path: Path, no_models: Path
):
    model = saved_model(tmp_path / "model", knows_faces=False)
    record = AnimationEngine(model).run(request_)
    assert "face_optimization" not in record
    assert not any("not optimised" in text for text in record["warnings"])
    record = AnimationEngine(model, changes=["face.mode=crop"]).run(request_)
    assert record["face_optimization"]["similarity_last"] > 0
