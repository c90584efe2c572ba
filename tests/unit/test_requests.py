"""Requests and manifests: what is accepted, and how the rest is refused."""

import json
import re
from pathlib import Path

import pytest

from inference.batch import manifest as manifests
from inference.batch.manifest import read_manifest
from inference.requests import AnimationOptions, AnimationRequest, RequestError


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
    assert items[1].output == "x.mp4"
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
        ({"size": "64"}, "size is '64', expected height and width as 1024x576"),
        ({"size": "0x64"}, "size is '0x64'"),
        ({"framing": "stretch"}, "'framing' is 'stretch', expected pad or crop"),
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
    rows = [line(), line(reference="copy.png", id="copy"), line(seed=1), line(size="64x64")]
    rows += [line(driving="clips/walk.mp4"), line(framing="crop")]

    def identities() -> list[str]:
        return [item.identity("model") for item in read_manifest(manifest(folder, *rows))]

    first, copy, *others = identities()
    assert first == copy
    other_model = read_manifest(manifest(folder, *rows))[0].identity("other")
    assert len({first, *others, other_model}) == 6
    found = {first}
    for name in ("clips/dance.pose.npz", "a.pose.npz"):
        (folder / name).write_bytes(b"keypoints beside a file steer the video too")
        found.add(identities()[0])
    (folder / "clips/dance.pose.npz").unlink()
    found.add(identities()[0])
    assert len(found) == 4


def test_outputs_without_a_name_are_named_by_content(folder: Path) -> None:
    rows = [line(), line(seed=1), line(size="64x96"), line(framing="crop")]
    names = [item.output for item in read_manifest(manifest(folder, *rows))]
    assert all(re.fullmatch(r"a-dance-[0-9a-f]{16}\.mp4", name) for name in names)
    assert len(set(names)) == len(rows)
    # The same names in any folder, and for copies; another for what was changed.
    (folder / "there").mkdir()
    (folder / "there" / "a.png").write_bytes((folder / "a.png").read_bytes())
    moved = line(reference="there/a.png")
    assert read_manifest(manifest(folder, moved))[0].output == names[0]
    with pytest.raises(RequestError, match="line 2: the same output 'a-dance-"):
        read_manifest(manifest(folder, line(), moved))
    (folder / "a.png").write_bytes(b"another picture")
    assert read_manifest(manifest(folder, line()))[0].output not in names


def test_names_by_content_are_plain_whatever_the_inputs_are_called(folder: Path) -> None:
    for name in ("..a: b\n.png", "é" * 100 + ".png", "---.png"):
        (folder / name).write_bytes(name.encode())
        [item] = read_manifest(manifest(folder, line(reference=name)))
        assert re.fullmatch(r"[\w-]+\.mp4", item.output)
        assert len(item.output.encode()) < manifests.MAX_NAME_BYTES


def test_a_manifest_beyond_the_limits_is_refused(folder: Path, monkeypatch) -> None:
    path = manifest(folder, line(), line(seed=1), line(seed=2))
    monkeypatch.setattr(manifests, "MAX_ITEMS", 2)
    with pytest.raises(RequestError, match="more than 2 lines; split the manifest"):
        read_manifest(path)
    monkeypatch.setattr(manifests, "MAX_BYTES", 1 << 20)
    path.write_text("\n" * (1 << 20) + "\n")
    with pytest.raises(RequestError, match="more than 1 MiB; split the manifest"):
        read_manifest(path)


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
