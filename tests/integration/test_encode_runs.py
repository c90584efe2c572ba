"""Encoding from end to end on Ray: resuming, killed processes, damaged shards, two runs at once."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from infra.cli import main
from pipelines import shards
from pipelines.clips import ClipStore
from pipelines.curation.ledger import WORK_FOLDER, FolderInUseError, folder_lock
from pipelines.encode.config import EncodeConfig, EncodeError
from pipelines.encode.members import shard_problems
from pipelines.encode.progress import Progress
from pipelines.encode.run import EncodeSummary, encode
from pipelines.encode.store import LatentStore
from pipelines.ray_session import RunError, session
from pipelines.schema import shard_name
from tests.unit.encode_shards import contents, moving_stripes, write_clips

NUM_SHARDS = 6
CONFIG = EncodeConfig(image_tokens=True)
CODE = (
    "import sys\n"
    "from pipelines.encode.run import encode\n"
    "from pipelines.encode.config import EncodeConfig\n"
    "encode(sys.argv[1], sys.argv[2], EncodeConfig(image_tokens=True), workers=1)\n"
)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of clips; one has a clip that does not decode, one has none, one is damaged."""
    folder = tmp_path_factory.mktemp("clips")
    for index in range(NUM_SHARDS):
        keys = [f"k{index}_{number:03d}" for number in range(0 if index == 3 else 2)]
        write_clips(
            folder,
            shard_name(index),
            {key: moving_stripes(30, index + 10 * n) for n, key in enumerate(keys)},
            damaged=["k1_001"],
        )
    tar = folder / f"{shard_name(4)}.tar"
    data = bytearray(tar.read_bytes())
    data[5000] ^= 1
    tar.write_bytes(data)
    return folder


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    import ray

    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    ray.init(address="local", num_cpus=4, **options)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def whole(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EncodeSummary]:
    """An undisturbed run, which the others are compared with."""
    out = tmp_path_factory.mktemp("whole")
    states: list[Progress] = []
    summary = encode(clips, out, CONFIG, workers=2, progress=states.append)
    assert states[0].stage == "models"
    last = states[-1]
    # The clips of the damaged shard are never begun.
    assert (last.clips, last.total_clips, last.failed) == (8, 10, 1)
    assert last.frames_per_second > 0
    return out, summary


def test_every_clip_is_encoded_or_recorded_as_failed(clips, whole):
    out, summary = whole
    assert summary.totals["clips"] == 7
    assert summary.totals["frames"] == 7 * 30
    assert (summary.shards_done, summary.shards_resumed, summary.shards_left) == (6, 0, 0)
    assert sorted(summary.failures) == ["k1_001", shard_name(4)]
    assert "does not decode" in summary.failures["k1_001"]
    assert "has been changed" in summary.failures[shard_name(4)]
    assert shards.verify(out).problems == ()
    for record in shards.read_records(out):
        assert shard_problems(out / f"{record.name}.tar", record) == []
    store, source = LatentStore(out), ClipStore(clips)
    assert set(source.keys) - set(store.keys) == {"k1_001", "k4_000", "k4_001"}
    assert not (out / WORK_FOLDER).exists()


def test_time_is_counted_by_kind_of_work(whole):
    shares = whole[1].shares
    assert {"decode", "latents", "image_tokens", "rest"} <= shares.keys()
    assert sum(shares.values()) == pytest.approx(1, abs=0.01)


def test_finished_run_has_nothing_left_to_do(clips, whole, tmp_path):
    source, out = tmp_path / "clips", tmp_path / "out"
    for folder, copy in ((clips, source), (whole[0], out)):
        copy.mkdir()
        for path in folder.glob("*.json"):
            if path.stem not in (shard_name(1), shard_name(4)):
                for name in (path.name, f"{path.stem}.tar"):
                    if (folder / name).exists():
                        shutil.copy2(folder / name, copy / name)
    before = contents(out)
    summary = encode(source, out, CONFIG)
    assert (summary.shards_done, summary.shards_resumed, summary.workers) == (0, 4, 0)
    assert contents(out) == before


def test_damaged_torn_and_failed_shards_are_made_again_with_the_same_bytes(clips, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    os.truncate(out / f"{shard_name(0)}.tar", 3000)
    (out / f"{shard_name(2)}.json").unlink()
    data = bytearray((out / f"{shard_name(5)}.tar").read_bytes())
    data[9000] ^= 1
    (out / f"{shard_name(5)}.tar").write_bytes(data)
    (out / WORK_FOLDER / "dead" / "shard-000000.x").mkdir(parents=True)
    (out / f".{shard_name(0)}.json.77.tmp").write_bytes(b"half")
    summary = encode(clips, out, CONFIG, workers=1, retry_failed=True)
    # Three damaged ones, that with a failed clip, and that whose source is damaged.
    assert (summary.shards_done, summary.shards_resumed) == (5, 1)
    # Nothing of what had a record is deleted, nor said to be well.
    assert (out / "damaged" / f"{shard_name(5)}.tar").read_bytes() == data
    assert "2 damaged shards lie in" in summary.notes[0]
    shutil.rmtree(out / "damaged")
    assert contents(out) == contents(whole[0])


def test_mended_and_changed_source_shards_are_encoded_again(clips, whole, tmp_path):
    source, out = tmp_path / "clips", tmp_path / "out"
    shutil.copytree(clips, source)
    shutil.copytree(whole[0], out)
    for index, length in ((0, 12), (4, 30)):
        keys = {f"k{index}_{n:03d}": moving_stripes(length, index + 10 * n) for n in range(2)}
        write_clips(source, shard_name(index), keys)
    summary = encode(source, out, CONFIG, workers=1)
    assert (summary.shards_done, summary.shards_changed) == (2, 2)
    # That with a failed clip is left as it is.
    assert (summary.shards_resumed, summary.shards_left) == (3, 1)
    store = LatentStore(out)
    assert store.latents(store.index("k0_001")).shape[0] == 12
    assert store.latents(store.index("k4_001")).shape[0] == 30


def start(source: Path, out: Path) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-c", CODE, str(source), str(out)],
        env=environment,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).resolve().parents[2],
    )


def test_resume_after_kill_of_the_driver_gives_the_same_bytes(clips, whole, tmp_path):
    out = tmp_path / "out"
    driver = start(clips, out)
    deadline = time.monotonic() + 240
    while not list(out.glob("shard-*.json")) and time.monotonic() < deadline:
        assert driver.poll() is None
        time.sleep(0.01)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    done = len(list(out.glob("shard-*.json")))
    assert 0 < done < NUM_SHARDS, "the kill came too late to mean anything"
    encode(clips, out, CONFIG, workers=1, retry_failed=True)
    assert contents(out) == contents(whole[0])


def test_killed_workers_are_replaced_and_the_run_is_whole(clips, whole, tmp_path):
    out = tmp_path / "out"
    killed = []

    def kill_some(state: Progress) -> None:
        if state.stage == "encode" and len(killed) < 2 and state.clips > 3 * len(killed):
            workers = [
                child
                for child in psutil.Process().children(recursive=True)
                if "MapWorker" in " ".join(child.cmdline())
            ]
            if workers and workers[0].pid not in killed:
                workers[0].kill()
                killed.append(workers[0].pid)

    encode(clips, out, CONFIG, workers=1, progress=kill_some)
    assert killed
    assert contents(out) == contents(whole[0])


def test_dry_run_tells_the_size_and_writes_nothing(clips, tmp_path):
    summary = encode(clips, tmp_path / "out", CONFIG, dry_run=True)
    assert (summary.shards_todo, summary.shards_done) == (6, 0)
    assert summary.estimate["clips"] == 10
    assert summary.estimate["frames"] == 300
    assert summary.estimate["latent_bytes"] == 300 * 48 * 16 * 12 * 2
    assert not (tmp_path / "out").exists()


def test_two_runs_and_other_settings_are_refused(clips, whole, tmp_path):
    with folder_lock(tmp_path), pytest.raises(FolderInUseError, match=str(os.getpid())):
        encode(clips, tmp_path, CONFIG)
    before = contents(whole[0])
    with pytest.raises(EncodeError, match=r"settings\.fit: 'pad' → 'crop'"):
        encode(clips, whole[0], EncodeConfig(image_tokens=True, fit="crop"))
    assert contents(whole[0]) == before


def test_more_workers_than_cpus_are_refused_instead_of_waiting_for_ever(clips, tmp_path):
    with pytest.raises(RunError, match=r"9 workers need .* the Ray cluster has"):
        encode(clips, tmp_path / "out", CONFIG, workers=9)
    with session(3, 2) as pool:
        assert (pool.workers, pool.gpus) == (2, 0.0)


def test_command_line_encodes_and_answers_in_json(clips, tmp_path, capsys):
    arguments = ["encode", str(clips), "--out", str(tmp_path / "out"), "--limit", "1", "--json"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--size", "64x64", "--workers", "1"])
    assert ended.value.code in (0, None)
    result = json.loads(capsys.readouterr().out)
    assert (result["shards_done"], result["shards_left"]) == (1, NUM_SHARDS - 1)
    assert result["totals"]["clips"] == 2
    assert result["settings"]["size"] == "64x64"
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--size", "65x65"])
    assert ended.value.code == 2
    assert "multiples of 32" in capsys.readouterr().err
