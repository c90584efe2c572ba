"""Requests and manifests: what is accepted, and how the rest is refused."""

import json
from pathlib import Path

import pytest

from inference.requests import (
    AnimationOptions,
    AnimationRequest,
    RequestError,
    read_manifest,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    for name in ("a.png", "b.png", "clips/dance.mp4", "clips/walk.mp4"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def manifest(folder: Path, *lines: object) -> Path:
    path = folder / "manifest.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n")
    return path


def line(**fields: object) -> dict[str, object]:
    return {"reference": "a.png", "driving": "clips/dance.mp4", **fields}


def test_relative_paths_start_at_the_manifests_folder(folder: Path) -> None:
    absolute = str(folder / "b.png")
    items = read_manifest(manifest(folder, line(), "", line(reference=absolute, seed=4, id="x")))
    assert [item.reference for item in items] == [folder / "a.png", folder / "b.png"]
    assert [item.output for item in items] == ["a-dance-0.mp4", "x.mp4"]
    assert [item.line for item in items] == [1, 3]
    assert items[1].options == AnimationOptions(seed=4)


def test_every_bad_line_is_named_at_once(folder: Path) -> None:
    path = manifest(folder, line(), "{", line(reference="none.png"), line(steps=0, id="z"))
    with pytest.raises(RequestError) as caught:
        read_manifest(path)
    message = str(caught.value)
    assert "3 bad line(s), nothing was started" in message
    for part in ("line 2: not JSON", "line 3: 'reference' is 'none.png'", "line 4: steps is 0"):
        assert part in message


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"referense": "a.png"}, "did you mean 'reference'"),
        ({"driving": None}, "'driving' is missing"),
        ({"driving": 3}, "'driving' is 3, expected a text"),
        ({"driving": "clips"}, "is no file"),
        ({"reference": "a\0.png"}, "is no file"),
        ({"seed": "7"}, "seed is '7', expected a whole number"),
        ({"seed": True}, "seed is True"),
        ({"seed": -1}, "seed is -1"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": "3"}, "guidance is '3'"),
        ({"output": "../escape.mp4"}, "plain file name"),
        ({"output": "/tmp/escape.mp4"}, "plain file name"),
        ({"output": "..\\escape.mp4"}, "plain file name"),
        ({"output": ".hidden.mp4"}, "plain file name"),
        ({"output": "a\nb.mp4"}, "plain file name"),
        ({"output": "film.avi"}, "ends in .mp4"),
        ({"output": "batch.mp4"}, "the batch uses itself"),
        ({"output": "a.error.mp4"}, "the batch uses itself"),
        ({"output": "x" * 300 + ".mp4"}, "304 bytes"),
        ({"id": "../up"}, "'id' is '../up'"),
    ],
)
def test_a_bad_field_is_refused_with_what_was_expected(
    folder: Path, fields: dict, complaint: str
) -> None:
    with pytest.raises(RequestError) as caught:
        read_manifest(manifest(folder, line(**fields)))
    assert "line 1: " in str(caught.value)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        ({"output": "x.mp4"}, {"output": "X.mp4", "seed": 1}, "output 'x.mp4'"),
        ({"id": "x", "output": "1.mp4"}, {"id": "x", "output": "2.mp4", "seed": 1}, "id 'x'"),
        ({"output": "1.mp4"}, {"output": "2.mp4"}, "request (reference, driving and options)"),
    ],
)
def test_duplicates_are_refused(folder: Path, first: dict, second: dict, what: str) -> None:
    with pytest.raises(RequestError, match="line 2: the same") as caught:
        read_manifest(manifest(folder, line(**first), line(**second)))
    assert what in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe", b"[]", b"[" * 100_000, b"null"])
def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=r"m\.jsonl"):
        read_manifest(path)
    with pytest.raises(RequestError, match="cannot be read"):
        read_manifest(tmp_path / "missing.jsonl")


def test_identity_follows_content_options_and_model_but_not_names(folder: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    rows = [line(), line(reference="copy.png"), line(seed=1), line(driving="clips/walk.mp4")]
    items = read_manifest(manifest(folder, *rows))
    same, copy, seed, driving = (item.identity("model", {}) for item in items)
    assert same == copy
    assert len({same, seed, driving, items[0].identity("other", {})}) == 4
    identities = {same}
    for name in ("clips/dance.pose.npz", "a.pose.npz"):
        (folder / name).write_bytes(b"keypoints beside a file steer the video too")
        identities.add(items[0].identity("model", {}))
    (folder / "clips/dance.pose.npz").unlink()
    identities.add(items[0].identity("model", {}))
    assert len(identities) == 4


def test_a_request_survives_json(folder: Path) -> None:
    request = AnimationRequest(
        reference=folder / "a.png", driving=folder / "d.mp4", output=Path("o.mp4"), steps=3
    )
    assert AnimationRequest.from_json(json.loads(json.dumps(request.to_json()))) == request
    with pytest.raises(RequestError, match="steps is 999, expected a whole number from 1 to 200"):
        AnimationRequest.from_json({**request.to_json(), "steps": 999})


def test_form_fields_become_options() -> None:
    fields = {"seed": "7", "steps": "", "guidance": "2.5", "prompt": "ignored"}
    assert AnimationOptions.from_text(fields) == AnimationOptions(seed=7, guidance=2.5)
    with pytest.raises(RequestError, match="steps is 'many', expected a whole number"):
        AnimationOptions.from_text({"steps": "many"})
