"""The order of the packages and the fences around heavy libraries hold in every file."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ORDER = ("animator", "pipelines", "inference", "training", "infra")
# A library and the only places that may import it (a file or a folder each).
FENCES = {
    "ray": (
        "pipelines/curation",
        "pipelines/encode",
        "pipelines/ray_pool.py",
        "pipelines/ray_session.py",
        "inference/batch/run.py",
        "inference/serving/serve.py",
        "training/ray_workers.py",
        "training/reporter.py",
        "training/validate_attempts.py",
        "infra",
    ),
    "deepspeed": ("training/engine_deepspeed.py", "training/ema.py"),
    "mlflow": ("training/tracking.py",),
    "torchvision": (),  # breaks diffusers where torch is the CPU build
}
# Folders that exist on one machine only; written so that this file does not match itself.
MACHINE_PATH = re.compile(
    r"(?<![\w.$}/-])/(?:" + "|".join(["wor[k]", "hom[e]", "roo[t]", "User[s]"]) + r")/\w"
)


def modules() -> list[Path]:
    return sorted(path for package in ORDER for path in (ROOT / package).rglob("*.py"))


def imported_names(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that `path` imports, at the top or inside a function, with its line."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else ()
            yield ".".join((*parent, *filter(None, [node.module]))), node.lineno


def violations(path: Path) -> list[str]:
    relative = path.relative_to(ROOT)
    home = relative.parts[0]
    found = []
    for name, line in imported_names(path):
        top = name.split(".")[0]
        if top in ORDER and ORDER.index(top) > ORDER.index(home):
            found.append(f"{relative}:{line}: {home} may not import {name}")
        if top in FENCES and not any(relative.is_relative_to(place) for place in FENCES[top]):
            found.append(f"{relative}:{line}: {top} is fenced off from here")
        if top == "tests":
            found.append(f"{relative}:{line}: the product may not import its tests")
    return found


def test_packages_import_only_to_their_left_and_respect_the_fences() -> None:
    found = [problem for path in modules() for problem in violations(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("place", "line", "complaint"),
    [
        ("animator/x.py", "from pipelines.video import probe", "animator may not import"),
        ("inference/x.py", "def f():\n    import training.loop", "inference may not import"),
        ("pipelines/x.py", "import ray", "ray is fenced off"),
        ("training/loop.py", "from deepspeed import ops", "deepspeed is fenced off"),
        ("infra/x.py", "import torchvision.io", "torchvision is fenced off"),
    ],
)
def test_the_check_sees_a_breach(
    place: str, line: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_text(line)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert len(violations(path)) == 1
    assert complaint in violations(path)[0]


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in modules()
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent, f"modules without a docstring: {silent}"


def test_no_file_names_a_folder_of_one_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if (
            path.suffix in {".png", ".jpg", ".webp", ".safetensors", ".npz", ".mp4"}
            or not path.is_file()
        ):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if MACHINE_PATH.search(line):
                found.append(f"{name}:{number}: {line.strip()[:80]}")
    assert not found, "\n".join(found)
