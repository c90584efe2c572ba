"""The command line: quick help, exit codes, one clear sentence for a mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from infra.cli import app, main
from infra.console import FAILED, WRONG_USE, report_error

HEAVY = {"torch", "ray", "mlflow", "deepspeed", "diffusers", "onnxruntime", "insightface", "cv2"}


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    code = ended.value.code
    return code if isinstance(code, int) else 0


def all_verbs() -> list[tuple[str, ...]]:
    found = []

    def walk(command: object, path: tuple[str, ...]) -> None:
        children = getattr(command, "commands", None)
        if children is None:
            found.append(path)
            return
        for name, child in children.items():
            walk(child, (*path, name))

    walk(get_command(app), ())
    return found


def test_help_needs_none_of_the_heavy_libraries() -> None:
    script = (
        "import sys\nfrom infra.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n"
        "    print('LOADED', *{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.rsplit("LOADED", 1)[1].split())
    assert "typer" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("verb", all_verbs(), ids=" ".join)
def test_every_verb_has_help_with_an_example(
    verb: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*verb, "--help") == 0
    assert f"Example: animator {' '.join(verb)}" in " ".join(capsys.readouterr().out.split())


def test_the_verbs_of_the_readme_exist() -> None:
    expected = {
        ("doctor",),
        ("demo",),
        ("models", "list"),
        ("curate", "run"),
        ("curate", "revise"),
        ("curate", "report"),
        ("encode",),
        ("submit", "curate"),
        ("shards", "verify"),
        ("shards", "stats"),
        ("shards", "show"),
        ("train", "alignment"),
        ("train", "animator"),
        ("align",),
        ("animate",),
        ("batch",),
        ("serve",),
        ("evaluate", "curation"),
        ("evaluate", "animator"),
    }
    assert expected <= set(all_verbs())


def test_an_unknown_verb_is_wrong_use() -> None:
    assert run("shards", "verfy") == WRONG_USE


def test_a_folder_without_shards_is_wrong_use_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("shards", "verify", str(tmp_path)) == WRONG_USE
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("animator: ")
    assert str(tmp_path) in printed.err
    assert len(printed.err.splitlines()) == 1


def test_the_traceback_is_there_for_those_who_ask(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANIMATOR_DEBUG", "1")
    assert run("shards", "verify", str(tmp_path)) == WRONG_USE
    assert "Traceback" in capsys.readouterr().err


def test_json_is_the_only_thing_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("models", "list", "--json") == 0
    models = json.loads(capsys.readouterr().out)
    assert {"name", "path", "licence", "source"} <= set(models[0])


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        ("curate nowhere --out made", "nowhere"),
        ("curate . --out made --set camera.max=3", "camera.max is not a setting"),
        ("train animator --recipe animtor_tiny --out made", "Did you mean animator_tiny?"),
        ("train animator --recipe alignment_tiny --out made", "does not train the animator"),
        ("train animator --shards nowhere --out made", "nowhere"),
        ("train alignment --shards nowhere --out made --set optim.lrr=1", "optim.lr"),
        ("animate --model nowhere --reference a.png --driving b.mp4 --out made.mp4", "nowhere"),
        ("animate --model a --reference b --driving c --out d.mp4 --size 9", "as 1024x576"),
        ("weights import-v1 nowhere --out made", "nowhere holds no v1 checkpoints"),
        ("weights import-v1 nowhere --out made --channel-order gbr", "expected rgb or bgr"),
        ("weights from-svd nowhere --out made", "no folder of Stable Video Diffusion"),
        ("bench forward --preset huge", "expected one of tiny, svd_xt"),
        (
            "train animator --recipe animator_576x1024_8gpu --shards nowhere --out made",
            "task.start=DIR",
        ),
        ("batch nowhere.jsonl --model nowhere --out made", "nowhere"),
        ("serve --model nowhere --data made", "nowhere"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing_behind(
    verb: str,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*verb.split()) == WRONG_USE
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("animator: ")
    assert said in message
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_wrong_use_and_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "nowhere.txt").read_text()
    assert report_error(caught.value) == WRONG_USE
    assert "nowhere.txt" in capsys.readouterr().err


def test_a_value_error_of_a_library_is_a_failed_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="Expecting") as caught:
        json.loads("{")
    # The innermost line is the library's, not ours.
    assert report_error(caught.value) == FAILED
    assert "JSONDecodeError" in capsys.readouterr().err
