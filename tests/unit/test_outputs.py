"""Published videos can be told from torn ones; one process works in a folder."""

import errno
import fcntl
import os
import shutil
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


@pytest.mark.parametrize(
    ("place", "call", "number"),
    [(fcntl, "flock", errno.ENOLCK), (os, "ftruncate", errno.ENOSPC), (os, "pwrite", errno.ENOSPC)],
)
def test_a_lock_that_cannot_be_had_leaves_no_file_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: object, call: str, number: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as system:
        system.setattr(place, call, fail)
        with pytest.raises(OSError, match=os.strerror(number)):
            FolderLock(tmp_path, "lock", "run")
    assert str(tmp_path / "lock") not in open_files()
    FolderLock(tmp_path, "lock", "run").close()


def open_files() -> list[str]:
    """What this process's descriptors stand for."""
    found = Path("/proc/self/fd").iterdir()
    return [os.readlink(path) for path in found if path.is_symlink()]


def make_for_ever(output: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that is making an output until it is killed, and the folder it makes it in."""
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom inference.outputs import making\n"
        "with making(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'video.mp4').write_bytes(b'half a video')\n"
        "    print(folder, flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script, str(output)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_process_left_of_an_output_is_removed_by_the_next(tmp_path: Path) -> None:
    output = tmp_path / "new" / "film.mp4"
    process, left = make_for_ever(output)
    try:
        with outputs.making(output) as folder:
            assert folder.parent == left.parent == output.parent
            assert (left / "video.mp4").exists(), "its process is alive"
    finally:
        process.kill()
        process.wait()
    for other in ("movie.mp4", "film.2.mp4", "fil.mp4"):
        with outputs.making(output.with_name(other)):
            assert (left / "video.mp4").exists(), "it is another output's"
    machine = left.name.split(".")[2].partition("-")[0]
    foreign = left.rename(left.with_name(left.name.replace(machine, "0" * len(machine))))
    with outputs.making(output):
        assert (foreign / "video.mp4").exists(), "it is another machine's"
    foreign.rename(left)
    with outputs.making(output) as folder:
        assert list(output.parent.iterdir()) == [folder]
    assert not list(output.parent.iterdir())


def test_what_is_made_is_removed_where_it_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with outputs.making(tmp_path / "film.mp4") as folder:
            (folder / "video.mp4").write_bytes(b"half a video")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("times", [1, 1000])
def test_a_folder_lost_to_another_run_before_it_is_locked_is_made_anew_and_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """The other run takes a folder without a lock for a dead process's."""
    genuine, lost = os.open, []

    def open_late(path: str | Path, *given: int, **named: int | None) -> int:
        if Path(path).name == outputs.MAKING_LOCK and len(lost) < times:
            lost.append(Path(path).parent)
            lost[-1].rmdir()
        return genuine(path, *given, **named)

    monkeypatch.setattr(os, "open", open_late)
    if times > 1:
        with pytest.raises(FileNotFoundError, match="gone as soon"), outputs.making(tmp_path / "f"):
            pass
    else:
        with outputs.making(tmp_path / "film.mp4") as folder:
            assert folder not in lost
            with pytest.raises(FolderInUseError):
                FolderLock(folder, outputs.MAKING_LOCK, "run")
        assert len(lost) == 1
    assert not list(tmp_path.iterdir())


def test_a_video_is_made_on_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with outputs.making(tmp_path / "film.mp4") as folder:
        (folder / "video.mp4").write_bytes(b"a video")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def dead(tmp_path: Path) -> Path:
    """What a killed process left of film.mp4."""
    with outputs.making(tmp_path / "film.mp4") as folder:
        (folder / "video.mp4").write_bytes(b"half a video")
        shutil.copytree(folder, tmp_path / "left")
    return (tmp_path / "left").rename(folder)


def test_a_dead_folder_goes_where_an_open_file_cannot_be_removed(
    dead: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS: a file that is removed while it is open has another name until it is closed."""
    remove, close = os.unlink, os.close

    def unlink(path: str, *, dir_fd: int | None = None) -> None:
        if str(dead / path) in open_files():
            os.rename(path, ".nfs0001", src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        else:
            remove(path, dir_fd=dir_fd)

    def close_and_remove(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        close(descriptor)
        if Path(path).name == ".nfs0001":
            remove(path)

    monkeypatch.setattr(os, "unlink", unlink)
    monkeypatch.setattr(os, "close", close_and_remove)
    outputs.remove_if_dead(dead)
    assert not dead.exists()


def test_a_folder_that_is_locked_anew_while_it_is_removed_stays(
    dead: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its maker, thought dead before it had the lock, comes as the lock's first file goes."""
    remove, makers = os.unlink, []

    def unlink(path: str, *, dir_fd: int | None = None) -> None:
        remove(path, dir_fd=dir_fd)
        if path == outputs.MAKING_LOCK and not makers:
            makers.append(FolderLock(dead, outputs.MAKING_LOCK, "run"))

    monkeypatch.setattr(os, "unlink", unlink)
    outputs.remove_if_dead(dead)
    [maker] = makers
    assert maker.is_in_place()
    maker.close()
