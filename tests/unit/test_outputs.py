"""Published videos can be told from torn ones; one process works in a folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from inference import outputs
from inference.outputs import FolderInUseError, FolderLock


@pytest.fixture
def final(tmp_path: Path) -> Path:
    staged, final = tmp_path / "staged.mp4", tmp_path / "film.mp4"
    staged.write_bytes(b"a video")
    outputs.publish(staged, final, outputs.describe(staged, {"seed": 3}))
    return final


def test_a_published_video_has_its_record(final: Path) -> None:
    record = outputs.published(final)
    assert record is not None
    assert record["seed"] == 3
    assert sorted(path.name for path in final.parent.iterdir()) == ["film.json", "film.mp4"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("film.mp4", None),
        ("film.mp4", b"a vide"),
        ("film.mp4", b"A video"),
        ("film.json", None),
        ("film.json", b'{"file": {"bytes"'),
        ("film.json", b'{"file": 7}'),
    ],
)
def test_a_torn_or_changed_pair_is_not_published(
    final: Path, name: str, content: bytes | None
) -> None:
    path = final.parent / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert outputs.published(final) is None


@pytest.mark.parametrize("content", [None, b""])
def test_an_engine_that_wrote_nothing_is_caught(tmp_path: Path, content: bytes | None) -> None:
    staged = tmp_path / "staged.mp4"
    if content is not None:
        staged.write_bytes(content)
    with pytest.raises(RuntimeError, match="without writing a video"):
        outputs.describe(staged, {})


def test_a_lock_is_refused_while_held_and_freed_by_a_killed_holder(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from inference.outputs import FolderLock\n"
        f"lock = FolderLock(Path({str(tmp_path)!r}), 'lock', 'server')\n"
        "print('held', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(FolderInUseError, match=f"another server .process {process.pid}."):
        FolderLock(tmp_path, "lock", "server")
    process.kill()
    FolderLock(tmp_path, "lock", "server", wait=5).close()


def test_sharers_keep_an_exclusive_holder_out(tmp_path: Path) -> None:
    first = FolderLock(tmp_path, "lock", "worker", shared=True)
    second = FolderLock(tmp_path, "lock", "worker", shared=True)
    first.close()
    with pytest.raises(FolderInUseError):
        FolderLock(tmp_path, "lock", "worker")
    second.close()
    FolderLock(tmp_path, "lock", "worker").close()
