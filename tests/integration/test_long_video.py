"""Long videos: memory that does not grow with the length, runs that survive being killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from animator.config import AnimatorConfig
from animator.weights import save_model
from inference.engine import LONG, AnimationEngine
from inference.requests import AnimationRequest
from pipelines.video import decode, encode, probe

ROOT = Path(__file__).resolve().parents[2]
SMALL = AnimatorConfig(
    height=64,
    width=64,
    num_frames=8,
    block_out_channels=(32, 32),
    num_attention_heads=(1, 1),
    cross_attention_dim=32,
    face_encoder_depth=1,
)
SHORT, LENGTHY = 64, 512
RESUMED = 70  # frames; long enough to be continued


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from animator.model import Animator

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("work") / "model"
    about = {"sampling": {"steps": 2, "sigma_min": 0.05, "sigma_max": 20.0}}
    save_model(folder, animator=(SMALL, Animator(SMALL).state_dict()), about=about)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> dict[int, Path]:
    """A picture, and a real clip with its keypoints, there and back again to several lengths."""
    folder = tmp_path_factory.mktemp("clips")
    source = data_root / "pose2d" / "ubc_91-3003CN5S"
    frames = decode(source.with_suffix(".mp4"), end=3.0, max_side=96)
    with np.load(source.with_suffix(".dwpose.npz")) as poses:
        points = poses["candidate"][: len(frames), None].astype(np.float32)
        score = (poses["subset"][: len(frames)] >= 0).astype(np.float32)
    there = [*range(len(frames)), *range(len(frames) - 2, 0, -1)]
    made = {0: folder / "person.png"}
    cv2.imwrite(str(made[0]), np.ascontiguousarray(frames[0][..., ::-1]))
    np.savez(folder / "person.pose.npz", keypoints=points[:1], score=score[:1], fps=30.0)
    for length in (SHORT, LENGTHY, RESUMED):
        chosen = np.resize(there, length)
        made[length] = folder / f"{length}.mp4"
        encode(made[length], (frames[i] for i in chosen), fps=30)
        np.savez(
            folder / f"{length}.pose.npz", keypoints=points[chosen], score=score[chosen], fps=30.0
        )
    return made


def started(folder: Path, model: Path, clips: dict[int, Path], length: int, **given: Any):
    """A process that animates the clip of that length."""
    import torch

    folder.mkdir(exist_ok=True)
    request = AnimationRequest(
        reference=clips[0], driving=clips[length], output=folder / f"{length}.mp4"
    )
    options = {"model": str(model), "changes": [], "kill_after": 0, "resumable": False}
    options |= {"threads": torch.get_num_threads(), **given}
    (folder / f"{length}.request").write_text(json.dumps({**options, "request": request.to_json()}))
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("long_video_run.py")),
         str(folder / f"{length}.request")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip


@pytest.mark.real_data
def test_eight_times_the_length_takes_no_more_memory_and_is_scored(model, clips, tmp_path):
    changes = ["windows.batch=4", "windows.overlap=2", "sampling.steps=1"]
    runs = {
        length: started(tmp_path, model, clips, length, changes=changes)
        for length in (SHORT, LENGTHY)
    }
    found = {length: json.loads(run.communicate()[0]) for length, run in runs.items()}
    peaks = {length: record["memory"]["host_mb"] for length, record in found.items()}
    assert peaks[SHORT] > 100
    assert peaks[LENGTHY] < 1.1 * peaks[SHORT]
    info = probe(tmp_path / f"{LENGTHY}.mp4")
    assert info.num_frames == LENGTHY
    seams = found[LENGTHY]["seams"]
    assert seams["windows"] in (85, 86)
    assert 0.5 < seams["sampling"]["score"] <= 1.1  # of 252 pairs of frames
    assert seams["colour_drift"] >= 0


@pytest.mark.real_data
def test_a_killed_run_is_continued_to_the_same_bytes_and_leaves_nothing(model, clips, tmp_path):
    folder = tmp_path / "killed"
    # 12 windows, 5 portions and the step itself are reported: the second step has begun.
    killed = started(folder, model, clips, RESUMED, kill_after=30, resumable=True)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    work = folder / f".{RESUMED}.work"
    assert json.loads((work / "state.json").read_text())["step"] == 1
    assert not (folder / f"{RESUMED}.mp4").exists()

    engine = AnimationEngine(model)
    request = AnimationRequest(
        reference=clips[0], driving=clips[RESUMED], output=folder / f"{RESUMED}.mp4"
    )
    stages = []
    engine.run(request, lambda share, stage: stages.append(stage), resumable=True)
    assert "step 0/2" not in stages
    record = json.loads((folder / f"{RESUMED}.json").read_text())
    assert record["continued_from_step"] == 1
    assert not work.exists()
    whole = AnimationRequest(
        reference=clips[0], driving=clips[RESUMED], output=tmp_path / "whole.mp4"
    )
    shares = []
    record = engine.run(whole, lambda share, stage: shares.append(share))
    assert shares == sorted(shares)
    assert request.output.read_bytes() == whole.output.read_bytes()
    assert record["seams"]["windows"] > 1
    assert {"perception", "sampling", "decoding", "encoding"} <= record["timings"].keys()
    assert record["memory"]["host_mb"] > 100


@pytest.mark.real_data
def test_what_was_computed_is_kept_when_a_run_is_stopped_and_only_for_its_request(
    model, clips, tmp_path
):
    class StopError(Exception):
        pass

    def stop(share: float, stage: str) -> None:
        if stage == "step 1/2":
            raise StopError

    engine = AnimationEngine(model)
    request = AnimationRequest(
        reference=clips[0], driving=clips[RESUMED], output=tmp_path / "a.mp4"
    )
    with pytest.raises(StopError):
        engine.run(request, stop, work=tmp_path / "work")
    assert json.loads((tmp_path / "work" / "state.json").read_text())["step"] == 1
    other = AnimationRequest(
        reference=clips[0], driving=clips[RESUMED], output=tmp_path / "a.mp4", seed=7
    )
    with pytest.raises(ValueError, match="another request"):
        engine.run(other, work=tmp_path / "work")
    engine.settings = engine.settings.with_choices(steps=1)
    with pytest.raises(ValueError, match="another request"):
        engine.run(request, work=tmp_path / "work")
    assert len(decode(clips[RESUMED])) > LONG
    assert sorted(path.name for path in tmp_path.iterdir()) == ["work"]
