"""One animation from files to files: sound, rate, shape, record; and what is refused."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from animator.alignment import AlignmentBlock
from animator.config import AlignmentConfig
from animator.weights import save_model
from inference.engine import AnimationEngine, AnimationError
from inference.people import HEAD
from inference.provenance import ProvenanceError
from inference.requests import AnimationRequest
from infra.cli import main
from pipelines.images import ImageError
from pipelines.shards import sha256_file
from pipelines.video import VideoError, decode, encode, probe
from tests.unit.test_provenance import certificate
from tests.unit.test_tasks import SMALL

FRAMES, FPS = 7, 10.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from animator.model import Animator

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("work") / "model"
    block = AlignmentBlock(AlignmentConfig(width=32, num_heads=4))
    save_model(
        folder,
        animator=(SMALL, Animator(SMALL).state_dict()),
        alignment=(block.config, block.state_dict()),
        about={"sampling": {"steps": 2, "sigma_min": 0.05, "sigma_max": 20.0}},
    )
    return folder


def write_pose(path: Path, points: np.ndarray, fps: float = FPS) -> None:
    score = np.ones((*points.shape[:2], 18), np.float32)
    np.savez(path, keypoints=points.astype(np.float32), score=score, fps=fps)


@pytest.fixture
def files(tmp_path: Path, no_models: Path) -> dict[str, Path]:
    """A wide picture and a tall clip with sound, each with its keypoints beside it."""
    rng = np.random.default_rng(0)
    body = rng.uniform(0.3, 0.7, (1, 1, 18, 2))
    picture = tmp_path / "person.png"
    Image.fromarray(rng.integers(0, 255, (60, 90, 3), np.uint8)).save(picture)
    write_pose(tmp_path / "person.pose.npz", body)
    sound = tmp_path / "sound.mp4"
    clip = tmp_path / "dance.mp4"
    frames = [np.full((96, 64, 3), 40 * t % 255, np.uint8) for t in range(FRAMES)]
    _with_tone(sound, frames)
    encode(clip, frames, fps=FPS, audio_from=sound)
    write_pose(tmp_path / "dance.pose.npz", np.repeat(body * 0.8, FRAMES, axis=0))
    return {"picture": picture, "clip": clip}


def _with_tone(path: Path, frames: list[np.ndarray]) -> None:
    """A clip with a tone, written by PyAV alone."""
    import av

    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 64, 96, "yuv420p"
        audio = container.add_stream("aac", rate=44100)
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode())
        samples = np.sin(np.arange(44100) / 20).astype(np.float32)[None]
        tone = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        tone.rate = 44100
        container.mux(audio.encode(tone))
        container.mux(audio.encode())


def request(files: dict[str, Path], output: Path, **changes) -> AnimationRequest:
    given = {"reference": files["picture"], "driving": files["clip"], "output": output, **changes}
    return AnimationRequest(**given)


def test_a_picture_and_a_clip_become_a_video_with_its_record(model, files, tmp_path):
    output = tmp_path / "out" / "person.mp4"
    shares = []
    engine = AnimationEngine(model)
    record = engine.run(request(files, output), lambda share, stage: shares.append(share))
    info = probe(output)
    assert info.fps == pytest.approx(FPS)
    assert info.num_frames == FRAMES
    assert info.has_audio
    # The picture is 90 x 60: its shape is kept, at the model's 64 pixels.
    assert info.width / info.height == pytest.approx(1.5, rel=0.05)
    assert json.loads(output.with_suffix(".json").read_text()) == record
    assert record["alignment"]["method"] == "learned"
    assert record["alignment"]["frames_used"] == FRAMES
    assert record["models"]["pose"]["licence"]
    assert record["video"]["frames"] == FRAMES
    assert shares == sorted(shares)
    assert sorted(path.name for path in output.parent.iterdir()) == ["person.json", "person.mp4"]


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(model, files, tmp_path):
    engine = AnimationEngine(model)
    outputs = [tmp_path / f"{name}.mp4" for name in "abc"]
    for output, seed in zip(outputs, (1, 1, 2), strict=True):
        engine.run(request(files, output, seed=seed))
    first, again, other = (output.read_bytes() for output in outputs)
    assert first == again
    assert not np.array_equal(decode(outputs[0]), decode(outputs[2]))
    assert first != other


def test_what_cannot_be_animated_is_said_in_one_sentence_and_leaves_nothing(
    model, files, tmp_path, no_models
):
    engine = AnimationEngine(model)
    lonely = tmp_path / "lonely.png"
    Image.new("RGB", (40, 40)).save(lonely)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(files["clip"].read_bytes()[:300])
    output = tmp_path / "results" / "x.mp4"
    cases = [
        (AnimationError, {"reference": tmp_path / "none.png"}, "no such reference image"),
        (AnimationError, {"reference": lonely}, "no person found in the reference image"),
        (ImageError, {"reference": files["clip"]}, "expected a JPEG, PNG or WebP"),
        (VideoError, {"driving": broken}, "expected an mp4"),
        (AnimationError, {"output": tmp_path / "x.gif"}, "must end in .mp4"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for kind, changes, said in cases:
        with pytest.raises(kind, match=said) as caught:
            engine.run(request(files, **{"output": output, **changes}))
        assert len(str(caught.value).splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_is_stopped_leaves_nothing(model, files, tmp_path):
    output = tmp_path / "stopped.mp4"

    class StopError(Exception):
        pass

    def stop(share: float, stage: str) -> None:
        if stage.startswith("step 1"):
            raise StopError

    with pytest.raises(StopError):
        AnimationEngine(model).run(request(files, output), stop)
    assert not [path for path in tmp_path.iterdir() if "stopped" in path.name]


def test_what_a_run_left_that_was_killed_while_it_encoded_is_removed_by_the_next(
    model, files, tmp_path
):
    output = tmp_path / "out" / "me.mp4"
    engine = AnimationEngine(model)
    stages = []
    engine.run(request(files, output), lambda share, stage: stages.append(stage))
    whole = output.read_bytes()
    given = {
        "request": request(files, output).to_json(),
        "model": str(model),
        "changes": [],
        "resumable": False,
        "threads": 1,
        "kill_after": stages.index("writing") + 4,
    }
    (tmp_path / "request.json").write_text(json.dumps(given))
    script = Path(__file__).with_name("long_video_run.py")
    ended = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "request.json")],
        env={**os.environ, "PYTHONPATH": str(script.parents[2])},
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL
    left = [path for path in output.parent.rglob("*") if path.name.startswith(".")]
    assert left, "the kill came too early to mean anything"
    assert output.read_bytes() == whole
    engine.run(request(files, output.with_name("other.mp4")))
    assert all(path.exists() for path in left)
    engine.run(request(files, output))
    assert sorted(path.name for path in output.parent.iterdir()) == [
        "me.json", "me.mp4", "other.json", "other.mp4",
    ]  # fmt: skip


def test_somebody_of_several_without_a_face_is_named_among_the_warnings(model, files, tmp_path):
    from skimage.data import astronaut

    Image.fromarray(astronaut()).save(files["picture"])
    head = np.array((0.44, 0.25), np.float32)  # of the portrait
    body = np.random.default_rng(1).uniform(0.4, 0.6, (18, 2)).astype(np.float32)
    body[HEAD] = head
    alone, two = body[None], np.stack([body, body + np.array((0.4, 0.0), np.float32)])
    said = {}
    for name, people in (("alone", alone), ("two", two)):
        write_pose(tmp_path / "person.pose.npz", people[None])
        write_pose(tmp_path / "dance.pose.npz", np.repeat(people[None], FRAMES, axis=0))
        record = AnimationEngine(model).run(request(files, tmp_path / f"{name}.mp4"))
        assert record["face"]["chosen"] == 1
        assert len(record["face_identity"]["similarity"]) == FRAMES
        said[name] = [text for text in record["warnings"] if "has no face" in text]
    assert said["alone"] == []
    [warning] = said["two"]
    said_of = "of the picture (from left to right) has no face that was found: "
    assert warning.startswith(f"person 2 {said_of}")
    # The same two from the other side: whoever has the face is the second now.
    Image.fromarray(np.ascontiguousarray(astronaut()[:, ::-1])).save(files["picture"])
    mirrored = two * np.array((-1, 1), np.float32) + np.array((1, 0), np.float32)
    write_pose(tmp_path / "person.pose.npz", mirrored[None])
    write_pose(tmp_path / "dance.pose.npz", np.repeat(mirrored[None], FRAMES, axis=0))
    record = AnimationEngine(model).run(request(files, tmp_path / "mirrored.mp4"))
    assert any(text.startswith(f"person 1 {said_of}") for text in record["warnings"])


@pytest.mark.real_data
def test_cuts_and_frames_that_show_nobody_are_among_the_warnings(model, files, tmp_path):
    rng = np.random.default_rng(1)
    scenes = rng.integers(0, 255, (2, 12, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    clip = tmp_path / "film.mp4"
    encode(clip, [scene for scene in scenes for _ in range(12)], fps=FPS)
    body = rng.uniform(0.3, 0.7, (1, 1, 18, 2)).repeat(24, 0)
    write_pose(tmp_path / "film.pose.npz", body)
    keypoints = dict(np.load(tmp_path / "film.pose.npz"))
    keypoints["score"][20:] = 0
    np.savez(tmp_path / "film.pose.npz", **keypoints)
    engine = AnimationEngine(model)
    record = engine.run(request(files, tmp_path / "a.mp4", driving=clip))
    assert record["video"]["cuts"] == [1.2]
    said = " ".join(record["warnings"])
    assert "the clip has 1 cut (at 1.20 s)" in said
    assert "nobody is seen in 4 of the clip's 24 frames" in said
    record = engine.run(request(files, tmp_path / "b.mp4"))
    assert record["video"]["cuts"] == []
    assert "cut" not in " ".join(record["warnings"])


def test_the_chosen_person_of_a_group_is_animated(model, files, tmp_path, data_root, monkeypatch):
    monkeypatch.setenv("ANIMATOR_MODELS", str(data_root / "models"))
    files["picture"] = data_root / "image" / "insightface_t1.jpg"  # six people
    engine = AnimationEngine(model)
    runs = {}
    for chosen in (1, 3):
        output = tmp_path / f"{chosen}.mp4"
        record = engine.run(request(files, output, reference_face=chosen))
        assert record["face"]["chosen"] == chosen
        runs[chosen] = record
    areas = {
        chosen: (x1 - x0) * (y1 - y0)
        for chosen, record in runs.items()
        for x0, y0, x1, y1 in [record["face"]["box"]]
    }
    assert areas[1] > areas[3]
    assert runs[1]["alignment"]["shift"] != runs[3]["alignment"]["shift"]
    with pytest.raises(AnimationError, match="face 9 was asked for, but 6 were found"):
        engine.run(request(files, tmp_path / "9.mp4", reference_face=9))
    assert not (tmp_path / "9.mp4").exists()


def test_the_frame_size_may_be_chosen_within_what_the_network_halves(model, files, tmp_path):
    engine = AnimationEngine(model, dtype="bf16")
    record = engine.run(request(files, tmp_path / "wide.mp4"), size=(64, 96))
    assert (record["video"]["height"], record["video"]["width"]) == (64, 96)
    assert record["sampling"]["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match=r"size of 60x96.*multiples of 16"):
        engine.run(request(files, tmp_path / "odd.mp4"), size=(60, 96))
    with pytest.raises(ValueError, match="expected auto, fp32"):
        AnimationEngine(model, dtype="int4")


def test_a_models_own_settings_can_be_changed(model, files, tmp_path):
    engine = AnimationEngine(model, changes=["sampling.solver=heun", "guidance.max=2.5"])
    record = engine.run(request(files, tmp_path / "out.mp4"))
    assert record["sampling"]["solver"] == "heun"
    assert record["sampling"]["steps"] == 2
    assert record["sampling"]["guidance"]["max"] == 2.5
    with pytest.raises(ValueError, match=r"sampling\.chrun"):
        AnimationEngine(model, changes=["sampling.chrun=1"])


def test_the_alignment_can_be_chosen_and_bounded(model, files, tmp_path):
    output = tmp_path / "held.mp4"
    named = {"model": model, "reference": files["picture"], "driving": files["clip"], "out": output}
    given = [part for name, value in named.items() for part in (f"--{name}", str(value))]
    chosen = "--alignment closed-form --per-frame --max-scale 1.1 --set alignment.max_rotation=3"
    with pytest.raises(SystemExit) as ended:
        main(["animate", *given, *chosen.split(), "--steps", "1"])
    assert not ended.value.code
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["alignment"]["method"] == "closed_form"
    assert record["alignment"]["per_frame"] is True
    assert max(record["alignment"]["scale"], 1 / record["alignment"]["scale"]) <= 1.1001
    assert record["models"]["alignment"]["name"] == "closed form"
    assert any("beyond the limits (scale 1.1, 3°)" in text for text in record["warnings"])
    assert AnimationEngine(model).pipeline.alignment_model["name"] == "model"
    with pytest.raises(ValueError, match="Got alignment 'guess'"):
        AnimationEngine(model, alignment="guess")


def test_conditions_are_encoded_once_a_clip_however_many_steps(model, files, tmp_path):
    engine = AnimationEngine(model, changes=["sampling.steps=5", "guidance.max=2"])
    calls = {"pose_net": 0, "face_encoder": 0, "unet": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    for name in calls:
        getattr(engine.pipeline.animator, name).register_forward_hook(count(name))
    engine.run(request(files, tmp_path / "out.mp4"))
    # Seven frames in windows of three with none shared: three calls of the UNet a step.
    assert calls["unet"] == 5 * 3
    assert calls["face_encoder"] == 1
    assert calls["pose_net"] == 1


def test_a_reference_is_encoded_once_for_many_clips_and_another_anew(model, files, tmp_path):
    engine = AnimationEngine(model)
    calls = []
    engine.pipeline.animator.face_encoder.register_forward_hook(lambda *_: calls.append(1))
    outputs = [tmp_path / f"{name}.mp4" for name in "abc"]
    engine.run(request(files, outputs[0]))
    engine.run(request(files, outputs[1]))
    assert len(calls) == 1
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    picture = np.asarray(Image.open(files["picture"])).copy()
    picture[0, 0] ^= 1
    Image.fromarray(picture).save(files["picture"])
    engine.run(request(files, outputs[2]))
    assert len(calls) == 2


def test_two_devices_and_portions_of_any_size_give_the_same_bytes(
    model, files, tmp_path, monkeypatch
):
    alone = AnimationEngine(model, changes=["windows.overlap=1"])
    alone.run(request(files, tmp_path / "alone.mp4"))
    engine = AnimationEngine(model, changes=["windows.overlap=1", "devices=cpu,cpu"])
    stream = engine.pipeline.stream
    monkeypatch.setattr(engine.pipeline, "stream", functools.partial(stream, portion=2))
    record = engine.run(request(files, tmp_path / "both.mp4"))
    assert (tmp_path / "alone.mp4").read_bytes() == (tmp_path / "both.mp4").read_bytes()
    assert record["seams"]["windows"] > 1
    with pytest.raises(ValueError, match="Got device 'gpu9' in devices"):
        AnimationEngine(model, changes=["devices=gpu9"]).run(request(files, tmp_path / "no.mp4"))
    offloaded = AnimationEngine(model, changes=["devices=cpu,cpu", "speed.offload=true"])
    with pytest.raises(ValueError, match=r"speed\.offload with devices cpu, cpu, but expected"):
        offloaded.run(request(files, tmp_path / "no.mp4"))


def test_numbers_that_are_not_finite_are_an_error_and_no_video(model, files, tmp_path):
    import torch

    engine = AnimationEngine(model)
    bias = engine.pipeline.animator.unet.conv_out.bias
    assert bias is not None
    with torch.no_grad():
        bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        engine.run(request(files, tmp_path / "out.mp4"))
    assert not (tmp_path / "out.mp4").exists()


def test_marks_are_put_on_the_video_and_a_wrong_key_is_refused_before(model, files, tmp_path):
    plain, marked = tmp_path / "plain.mp4", tmp_path / "marked.mp4"
    record = AnimationEngine(model).run(request(files, plain))
    assert record["provenance"] == {"watermark": "", "c2pa": False}
    mark = ["provenance.watermark=AI-generated"]
    record = AnimationEngine(model, changes=mark).run(request(files, marked))
    assert record["provenance"] == {"watermark": "AI-generated", "c2pa": False}
    change = decode(marked).astype(int) - decode(plain)
    height = change.shape[1]
    assert abs(change[:, height // 2 :]).max() > 20
    assert abs(change[:, : height // 2]).mean() < abs(change[:, height // 2 :]).mean() / 4
    files = [f"provenance.{name}={tmp_path / 'missing.pem'}" for name in ("certificate", "key")]
    with pytest.raises(ProvenanceError, match=r"missing\.pem: cannot be read"):
        AnimationEngine(model, changes=files)


def test_a_signed_video_names_its_models_and_its_record_has_its_hash(model, files, tmp_path):
    c2pa = pytest.importorskip("c2pa", reason="c2pa-python is not installed")
    chain, key = certificate(tmp_path)
    output = tmp_path / "signed.mp4"
    changes = [f"provenance.certificate={chain}", f"provenance.key={key}"]
    record = AnimationEngine(model, changes=changes).run(request(files, output))
    reader = c2pa.Reader(output)
    assert reader.get_validation_state() == "Valid"
    assert "face_detector" in json.dumps(reader.get_active_manifest())
    assert record["provenance"]["c2pa"]
    assert record["file"]["sha256"] == sha256_file(output)


def test_an_output_that_cannot_be_or_must_not_be_is_refused_before_any_work(model, files, tmp_path):
    engine = AnimationEngine(model)
    before = files["clip"].read_bytes()
    (tmp_path / "folder.mp4").mkdir()
    for output, said in (
        (files["clip"], "over an input"),
        (tmp_path / "folder.mp4", "is a folder"),
        (files["picture"] / "me.mp4", "nothing can be written there, as .* is a file"),
    ):
        with pytest.raises(AnimationError, match=said):
            engine.run(request(files, output))
    assert files["clip"].read_bytes() == before
