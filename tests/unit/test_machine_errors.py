"""Whose trouble an error is: a full disk stops the run, a source that cannot be read does not."""

import errno
from pathlib import Path

import numpy as np
import pytest

from pipelines.curation.decoder import describe_failure
from pipelines.curation.frames import FrameSpool
from pipelines.curation.isolation import SourceError, _failure
from pipelines.curation.machine import OwnFileError, is_of_machine, own_files
from pipelines.curation.source import _readable
from pipelines.curation.worker import _hash
from pipelines.video import VideoError, probe

# Reading it from the start is what the kernel calls an input/output error.
UNREADABLE = Path("/proc/self/mem")
ON_LINUX = pytest.mark.skipif(not UNREADABLE.exists(), reason="needs Linux's /proc")


def told(error: BaseException) -> Exception:
    """What the parent makes of what the decoder says of an error."""
    return _failure(describe_failure(error, "/data/a.mp4"), 0)


@ON_LINUX
def test_a_bad_sector_of_a_source_is_noted_and_may_pass():
    with pytest.raises(SourceError, match=r"cannot be read \(Input/output error\)") as caught:
        _hash(UNREADABLE)
    assert caught.value.kind == "transient"
    assert not is_of_machine(caught.value)


def test_a_bad_sector_met_while_decoding_is_noted_and_may_pass():
    found = told(OSError(errno.EIO, "Input/output error"))
    assert isinstance(found, SourceError)
    assert (str(found), found.kind) == ("cannot be read (Input/output error)", "transient")

    def frames():
        yield np.zeros((2, 2, 3), np.uint8)
        raise OSError(errno.EIO, "Input/output error")

    # Also where a clip is written of it meanwhile.
    with pytest.raises(VideoError) as caught, own_files():
        list(_readable(Path("/data/a.mp4"), frames()))
    found = told(caught.value)
    assert isinstance(found, SourceError)
    assert found.kind == "transient"


def test_what_ffmpeg_says_of_a_damaged_file_stops_no_run(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"\0\0\0\x18ftypmp42" + b"\0" * 100)
    with pytest.raises(VideoError) as caught:
        probe(path)
    found = told(caught.value)
    assert isinstance(found, SourceError)
    assert found.kind == "permanent"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_frames_that_find_no_room_stop_the_run():
    with open("/dev/full", "r+b", buffering=0) as full:
        spool = FrameSpool(full.fileno(), (2, 2))
        with pytest.raises(OwnFileError) as caught:
            spool.put(np.zeros((2, 2, 3), np.uint8))
    found = told(caught.value)
    assert isinstance(found, OSError)
    assert found.errno == errno.ENOSPC
    assert is_of_machine(found)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_clip_that_cannot_be_written_stops_the_run(number):
    error = VideoError("out.mp4: cannot be encoded")
    error.__cause__ = OSError(number, "x")
    with pytest.raises(OwnFileError) as caught, own_files():
        raise error
    found = told(caught.value)
    assert isinstance(found, OSError)
    assert found.errno == number


def test_too_many_open_files_stop_the_run_also_where_a_source_is_opened():
    try:
        try:
            raise OSError(errno.EMFILE, "Too many open files")
        except OSError:
            raise VideoError("a.mp4: cannot be read") from None
    except VideoError as error:
        found = told(error)
    assert isinstance(found, OSError)
    assert found.errno == errno.EMFILE
