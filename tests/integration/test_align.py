"""`animator align` from files to a page and its numbers; and what is refused."""

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from animator.alignment import AlignmentBlock
from animator.config import AlignmentConfig
from animator.weights import save_model
from infra.cli import main
from infra.console import WRONG_USE
from pipelines.pose_file import FilePoseBackend, read_keypoints
from pipelines.video import decode, encode
from tests.unit.test_alignment_report import BODY, dancer, misaligned

FRAMES, FPS = 12, 10.0
MAX_PAGE = 3_000_000


def write_pose(path: Path, points: np.ndarray) -> None:
    score = np.ones(points.shape[:3], np.float32)
    np.savez(path, keypoints=points.astype(np.float32), score=score, fps=FPS)


@pytest.fixture
def files(tmp_path: Path, no_models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A picture and a clip whose figure is smaller and turned, keypoints beside them, a block."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (256, 192, 3), np.uint8)).save("me.png")
    write_pose(Path("me.pose.npz"), BODY[None, None])
    frames = [np.full((128, 96, 3), 20 * t, np.uint8) for t in range(FRAMES)]
    encode(Path("dance.mp4"), frames, fps=FPS)
    write_pose(Path("dance.pose.npz"), misaligned(dancer(FRAMES), 0.6, 12.0, (0.05, 0.0)))
    torch.manual_seed(0)
    block = AlignmentBlock(AlignmentConfig(width=32, num_heads=4))
    save_model(Path("block"), alignment=(block.config, block.state_dict()))
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code: object = 0
    try:
        main(["align", *arguments])
    except SystemExit as ended:
        code = ended.code
    printed = capsys.readouterr()
    return (code if isinstance(code, int) else 0), printed.out, printed.err


def given(**changes: str) -> list[str]:
    named = {"reference": "me.png", "driving": "dance.mp4", "report": "page.html"} | changes
    return [part for name, value in named.items() for part in (f"--{name}", value)]


def words(page: str) -> str:
    """What the page says: without tags, pictures and line ends."""
    page = re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(page).split())


def test_a_page_without_an_animator_says_what_its_json_says(files, capsys):
    code, out, err = run(capsys, *given(alignment="block"), "--json")
    result = json.loads(out)
    page = (files / "page.html").read_text()
    said = words(page)
    assert code == 0
    assert len(page) < MAX_PAGE
    assert result["used"] == result["alignment"]["method"] == "learned"
    assert result["verdict"]["text"] in said
    assert result["summary"] in said
    assert [*result["methods"]] == ["none", "affine", "closed_form", "learned"]
    for row in result["methods"].values():
        person = row["people"][0]
        assert f"{person['scale']:.2f} {person['degrees']:+.1f}°".replace("-", "−") in said
        assert f"{100 * row['outside']:.1f} %" in said
    (person,) = result["people"]
    assert f"{person['frames_used']} / {FRAMES}" in said
    assert len(person["frames_own"]["scale"]) == FRAMES
    assert [f"frame {frame['frame']}" in said for frame in result["shown"]] == [True] * len(
        result["shown"]
    )
    for warning in result["warnings"]:
        assert f"warning: {warning['text']}" in err
        assert warning["advice"] in said
    assert result["models"]["alignment"]["name"] == "block"
    assert result["models"]["pose"]["name"] == "file:me.pose.npz, file:dance.pose.npz"
    assert sorted(p.name for p in files.glob("*.html*")) == ["page.html"]


def test_the_page_needs_no_network_and_names_no_folder(files, capsys):
    run(capsys, *given(reference=str(files / "me.png"), alignment=str(files / "block")))
    page = (files / "page.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert str(files) not in page
    assert "animator align --reference me.png --driving dance.mp4" in page
    pictures = re.findall(r'src="([^"]{20})', page)
    assert len(pictures) > 10
    assert {start.split(",")[0] for start in pictures} == {
        "data:image/webp;base64".split(",")[0][:20]
    }


def test_the_closed_form_undoes_what_was_done_and_its_poses_can_be_read_again(files, capsys):
    code, out, err = run(capsys, *given(alignment="closed-form", out="moved.pose.npz"))
    assert code == 0
    assert "note: no face was found" in err
    assert "cannot say how sure" in out
    keypoints, score, _ = read_keypoints(files / "moved.pose.npz")
    truth = dancer(FRAMES)
    assert score.shape == truth.shape[:3]
    assert np.abs(keypoints - truth).mean() < 0.03
    track = FilePoseBackend().track(
        [np.zeros((8, 8, 3), np.uint8)] * FRAMES,
        source=files / "moved.mp4",
        times=np.arange(FRAMES) / FPS,
    )
    np.testing.assert_allclose(track.keypoints, keypoints, atol=1e-6)


def test_the_settings_reach_the_alignment(files, capsys):
    free = json.loads(run(capsys, *given(alignment="closed-form"), "--json")[1])
    held = json.loads(
        run(
            capsys,
            *given(alignment="closed-form"),
            *("--max-scale", "1.2", "--max-rotation", "5", "--per-frame", "--no-keep-aligned"),
            "--json",
        )[1]
    )
    assert free["alignment"]["scale"] > 1.5
    assert held["alignment"]["scale"] == pytest.approx(1.2)
    assert held["alignment"]["degrees"] == pytest.approx(-5)
    assert held["alignment"]["per_frame"] is True
    assert "beyond the limits" in held["warnings"][0]["text"]
    assert "--max-scale" in held["warnings"][0]["advice"]
    assert held["command"].endswith(
        "--max-scale 1.2 --max-rotation 5 --per-frame --no-keep-aligned"
    )
    assert held["settings"]["keep_aligned"] is False


def test_hostile_names_are_only_text(files, capsys):
    name = '<img src=x onerror="alert(1)">&.png'
    (files / "me.png").rename(files / name)
    (files / "me.pose.npz").rename(files / f"{name.removesuffix('.png')}.pose.npz")
    code, _, _ = run(capsys, *given(reference=name, alignment="closed-form"))
    page = (files / "page.html").read_text()
    assert code == 0
    assert "onerror=" in page
    assert "<img src=x" not in page
    assert name in html.unescape(page)


def test_several_people_are_each_reported(files, capsys):
    pair = np.concatenate([BODY * 0.4, BODY * 0.4 + np.float32((0.5, 0.3))]).reshape(1, 2, 18, 2)
    write_pose(files / "me.pose.npz", pair)
    clip = np.concatenate([dancer(FRAMES) * 0.2, dancer(FRAMES) * 0.2 + np.float32(0.5)], 1)
    write_pose(files / "dance.pose.npz", clip)
    _, out, _ = run(capsys, *given(alignment="closed-form"), "--json")
    result = json.loads(out)
    said = words((files / "page.html").read_text())
    assert len(result["people"]) == result["reference"]["people"] == 2
    assert "person 2 of the clip moves person 2 of the picture" in said
    assert "closed form, person 2" in said
    write_pose(files / "me.pose.npz", pair[:, :1])
    _, _, err = run(capsys, *given(alignment="closed-form"))
    assert "the clip shows 2 people, of whom 1 has a partner" in err
    assert "the others are left out" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (given(reference="nobody.png"), "nobody.png: no such reference image"),
        (given(driving="nothing.mp4"), "nothing.mp4: no such driving video"),
        (given(reference="dance.mp4"), "expected a JPEG, PNG or WebP"),
        (given(driving="me.png"), "me.png: cannot be opened as a video"),
        (given(report="away/page.html"), "make the folder away first"),
        (given(report="page.pdf"), "must end in .html"),
        (given(out="away/a.pose.npz"), "make the folder away first"),
        (given(out="moved.npz"), "must end in .pose.npz"),
        (given(out="dance.pose.npz"), "written over the keypoints of an input"),
        (given(alignment="guess"), "Got alignment 'guess'"),
        (given(alignment="empty"), "empty is not a model folder"),
        ([*given(), "--max-scale", "0.5"], "max_scale is 0.5"),
        ([*given(), "--max-rotation", "200"], "max_rotation is 200"),
        ([*given(), "--reference-face", "0"], "reference_face is 0"),
        ([*given(alignment="closed-form"), "--reference-face", "3"], "face 3 was asked for"),
        ([*given(alignment="closed-form"), "--pose", "dwpose"], "no person detector and DWPose"),
        (given(reference="lonely.png", alignment="closed-form"), "no person found in the ref"),
        (given(driving="empty.mp4", alignment="closed-form"), "no person found in the driving"),
    ],
)
def test_what_cannot_be_aligned_is_said_in_one_sentence_and_leaves_nothing(
    arguments, said, files, capsys
):
    (files / "empty").mkdir()
    Image.new("RGB", (40, 40)).save(files / "lonely.png")
    encode(files / "empty.mp4", [np.zeros((32, 32, 3), np.uint8)] * 3, fps=FPS)
    before = sorted(files.rglob("*"))
    code, out, err = run(capsys, *arguments)
    message = err.splitlines()[-1]
    assert code == WRONG_USE
    assert message.startswith("animator: ")
    assert said in message
    assert out == ""
    assert sorted(files.rglob("*")) == before


def test_poses_without_common_joints_are_a_warning_and_a_page(files, capsys):
    score = np.zeros((FRAMES, 1, 18), np.float32)
    score[..., 8:14] = 1
    np.savez(files / "dance.pose.npz", keypoints=dancer(FRAMES), score=score, fps=FPS)
    head = np.ones((1, 1, 18), np.float32)
    head[..., 8:14] = 0
    np.savez(files / "me.pose.npz", keypoints=BODY[None, None], score=head, fps=FPS)
    code, out, err = run(capsys, *given(alignment="closed-form"), "--json")
    result = json.loads(out)
    assert code == 0
    assert result["verdict"]["level"] == "reject"
    assert "warning: no joint is seen in both" in err
    assert "choose" in result["warnings"][0]["advice"].lower()
    assert (files / "page.html").is_file()


@pytest.mark.real_data
def test_a_real_clip_on_a_real_picture(tmp_path, models_env, data_root, capsys):
    picture = data_root / "image" / "liveportrait_s12.jpg"
    frames = decode(data_root / "video" / "liveportrait_d0.mp4", end=1.0, fps=12)
    encode(tmp_path / "head.mp4", frames, fps=12)
    code, out, _ = run(
        capsys,
        *given(reference=str(picture), driving=str(tmp_path / "head.mp4")),
        *("--report", str(tmp_path / "page.html"), "--alignment", "closed-form", "--json"),
    )
    result = json.loads(out)
    assert code == 0
    # The head of the clip fills more of its frame than the head of the picture does.
    assert 0.3 < result["alignment"]["scale"] < 0.9
    assert result["methods"]["closed_form"]["off"] < 0.5 * result["methods"]["none"]["off"]
    assert (tmp_path / "page.html").stat().st_size < MAX_PAGE
