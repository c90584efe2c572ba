"""Curation on a cluster that changes: nodes that come, go, are full or unlike each other, and jobs.

Every run must end by itself with the bytes of one that had a quiet machine, or with one sentence.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from curation_kills import SETTINGS, contents, make_videos
from killing import UNHURRIED, below, kill_tree, raylet

from pipelines.curation.config import CurationConfig
from pipelines.curation.isolation import NAME
from pipelines.curation.ledger import RunJournal
from pipelines.curation.pipeline import ShardWorker, curate
from pipelines.curation.worker import versions
from pipelines.overrides import apply_overrides
from pipelines.ray_pool import run_pool
from pipelines.ray_session import cluster as connected
from pipelines.ray_session import session
from pipelines.ray_sizes import Pool, RunError, fit

pytestmark = pytest.mark.slow

SINGLE = [text for text in SETTINGS if "sources_per_shard" not in text]
SINGLE.append("output.sources_per_shard=1")
CONFIG = apply_overrides(CurationConfig(), SINGLE)
WAIT_SECONDS = 300.0
BYTES = 100 << 20
DRIVERS: list[subprocess.Popen[bytes]] = []


def test_workers_fit_the_machines_they_are_put_on():
    cpus = [{"CPU": 4.0}, {"CPU": 2.0}]
    assert fit(cpus, None, 100, threads=None) == Pool(6, 0.0, 1)
    assert fit(cpus, None, 100, threads=None, grows=True).most == 100
    assert fit(cpus, None, 100, threads=3) == Pool(1, 0.0, 3)  # never parts on two machines
    gpus = [{"CPU": 16.0, "GPU": 2.0}, {"CPU": 12.0, "GPU": 1.0}, {"CPU": 64.0}]
    assert fit(gpus, None, 1000, threads=None) == Pool(3, 1.0, 8)
    assert fit(gpus, 6, 1000, threads=None) == Pool(6, 0.5, 4)
    assert fit(gpus, None, 1000, per_gpu=4) == Pool(12, 0.25, 1)
    assert fit([{"CPU": 1.0, "GPU": 1.0}], None, 1000, threads=None) == Pool(1, 1.0, 1)
    assert fit(gpus, None, 2, threads=None) == Pool(1, 1.0, 2)


def test_too_many_workers_are_refused_with_what_is_there():
    with pytest.raises(RunError, match=r"7 workers need 1 CPU each.*room for 6.*4 CPUs; 2 CPUs"):
        fit([{"CPU": 4.0}, {"CPU": 2.0}], 7, 100)
    with pytest.raises(RunError, match=r"need 32 CPUs and 1 GPU each.*--decoders"):
        fit([{"CPU": 16.0, "GPU": 1.0}], None, 100, threads=32)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Machines:
    """A Ray cluster on whose head nothing is done; the other machines come and go.

    Args:
        dashboard: the port for one.
    """

    def __init__(self, dashboard: int | None = None) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "object_store_memory": BYTES, "_system_config": UNHURRIED}
        head["include_dashboard"] = dashboard is not None
        if dashboard is not None:
            head |= {"dashboard_host": "127.0.0.1", "dashboard_port": dashboard}
            head["dashboard_agent_listen_port"] = free_port()
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = str(self._cluster.address)
        self.here: list[Any] = []

    def add(self, cpus: int, gpus: int = 0) -> Any:
        self.here.append(
            self._cluster.add_node(num_cpus=cpus, num_gpus=gpus, object_store_memory=BYTES)
        )
        return self.here[-1]

    def vanish(self, node: Any) -> None:
        """As a machine does: its Ray process and all below it at once, without a word."""
        kill_tree(raylet(node))
        self.here.remove(node)
        with suppress(Exception):
            self._cluster.remove_node(node, allow_graceful=False)

    def clear(self) -> None:
        """Only the head is left, and Ray knows it."""
        for node in list(self.here):
            self.vanish(node)
        until(lambda: sum(node["Alive"] for node in self._cluster.global_state.node_table()) == 1)

    def close(self) -> None:
        self._cluster.shutdown()


def until(ready: Callable[[], Any], driver: subprocess.Popen[bytes] | None = None) -> Any:
    """What `ready` answers as soon as that is something."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        if found := ready():
            return found
        assert driver is None or driver.poll() is None, "the run ended too early to mean anything"
        time.sleep(0.05)
    raise TimeoutError(f"nothing of {ready} within {WAIT_SECONDS:g} s")


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    found = Machines()
    yield found
    found.close()


@pytest.fixture(autouse=True)
def _clean(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if "machines" not in request.fixturenames:
        yield
        return
    found: Machines = request.getfixturevalue("machines")
    monkeypatch.setenv("RAY_ADDRESS", found.address)
    yield
    for driver in DRIVERS:  # of a test that failed
        if driver.poll() is None:
            kill_tree(driver.pid)
    found.clear()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_videos(tmp_path_factory.mktemp("sources") / "videos", 8)


@pytest.fixture(scope="module")
def expected(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run with nothing around it makes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    log = out.with_name("log")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        # Not in this process: Ray's shutdown there would reach the cluster that it holds.
        end(start([*command(videos, out), "--workers", "1"], log), log)
    return contents(out)


def command(videos: Path, out: Path) -> list[str]:
    words = ["curate", str(videos), "--out", str(out)]
    return [*words, *(part for text in SINGLE for part in ("--set", text))]


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as stream:
        driver = subprocess.Popen(
            [sys.executable, "-m", "infra", *words],
            stdout=stream,
            stderr=stream,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    DRIVERS.append(driver)
    return driver


def end(driver: subprocess.Popen[bytes], log: Path) -> None:
    assert driver.wait(WAIT_SECONDS) == 0, log.read_text()[-3000:]


def test_run_waits_for_a_machine_grows_with_the_cluster_and_outlives_one(
    machines, videos, expected, tmp_path
):
    out, log = tmp_path / "out", tmp_path / "log"
    driver = start(command(videos, out), log)
    until(lambda: "no machine with a CPU yet" in log.read_text(), driver)
    first = machines.add(cpus=1)
    # Held at its work, so that it is the first machine's when the second comes.
    held = until(lambda: below(first, NAME), driver)[0]
    held.suspend()
    second = machines.add(cpus=1)
    until(lambda: below(second, NAME), driver)
    machines.vanish(first)
    end(driver, log)
    assert not held.is_running()
    assert contents(out) == expected


def test_one_gpu_worker_serves_several_decoders_and_outlives_their_deaths_and_its_own(
    machines, videos, expected, tmp_path
):
    node, out, log = machines.add(cpus=3, gpus=1), tmp_path / "out", tmp_path / "log"
    driver = start(command(videos, out), log)
    working = until(lambda: len(found := below(node, NAME)) == 3 and found, driver)
    workers = below(node, "MapWorker")
    assert len(workers) == 1, "the models are to be held once"
    working[0].kill()
    working[1].suspend()  # holds its shard until the worker dies
    until(lambda: len(list(out.glob("shard-*.json"))) >= 2, driver)
    workers[0].kill()
    end(driver, log)
    assert contents(out) == expected


def test_many_threads_of_one_worker_make_the_bytes_of_one(machines, videos, expected, tmp_path):
    machines.add(cpus=4)
    summary = curate([str(videos)], tmp_path, CONFIG, decoders=4)
    assert (summary.workers, summary.decoders) == (1, 4)
    assert contents(tmp_path) == expected


def test_cluster_without_room_is_said_so_instead_of_waiting_for_ever(machines, videos, tmp_path):
    import ray

    @ray.remote(num_cpus=2)
    class Holder:
        def answer(self) -> bool:
            return True

    with pytest.raises(RunError, match=r"no machine with a CPU yet.*autoscaler"):
        curate([str(videos)], tmp_path, CONFIG, patience=1)
    machines.add(cpus=2)
    with pytest.raises(RunError, match=r"3 workers need 1 CPU each.*room for 2"):
        curate([str(videos)], tmp_path, CONFIG, workers=3)
    with connected():
        holder = Holder.remote()
        ray.get(holder.answer.remote())
        with pytest.raises(RunError, match=r"other work holds .* needs 1 CPU .* 0 CPUs are free"):
            curate([str(videos)], tmp_path, CONFIG, patience=1)


def test_run_that_loses_all_machines_ends_and_goes_on_later(machines, videos, expected, tmp_path):
    node, lost = machines.add(cpus=1), []

    def lose(state: Any) -> None:
        # A source counts as done before its shard is committed, and only shards are resumed.
        if state.stage == "work" and list(tmp_path.glob("shard-*.json")) and not lost:
            lost.append(node)
            kill_tree(raylet(node))

    with pytest.raises(RunError, match="no machine of the Ray cluster has had room"):
        curate([str(videos)], tmp_path, CONFIG, patience=3, progress=lose)
    machines.vanish(node)
    machines.add(cpus=1)
    assert curate([str(videos)], tmp_path, CONFIG).shards_resumed >= 1
    assert contents(tmp_path) == expected


def test_worker_that_does_not_fit_the_driver_says_why(machines, tmp_path):
    machines.add(cpus=1)
    journal, run = RunJournal.create(tmp_path)
    other = versions() | {"av": "0.1"}
    with session(None, 1) as pool:
        for folder, wanted, words in (
            (tmp_path, other, r"the worker on \S+ has av .*, the driver av 0\.1: install the same"),
            (tmp_path / "elsewhere", versions(), "does not see what the driver wrote into"),
        ):
            arguments = (str(folder), str(tmp_path), run, frozenset(), 1, wanted)
            with pytest.raises(RunError, match=words):
                run_pool(ShardWorker, arguments, ["shard-000000"], pool, 100)
    journal.close()


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def served(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    """A cluster of its own, with a dashboard, which is what takes jobs."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # As where the environment is activated: a job's `python` is the cluster's.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    found = Machines(port)
    yield found
    found.close()


def test_submitted_job_can_be_stopped_and_submitted_again(served, port, videos, expected, tmp_path):
    node, out, log = served.add(cpus=2), tmp_path / "out", tmp_path / "log"
    submit = ["submit", "--address", f"http://127.0.0.1:{port}"]
    first = start([*submit, "--name", "first", *command(videos, out)], log)
    until(lambda: list(out.glob("shard-*.json")), first)
    for decoder in until(lambda: below(node, NAME), first):
        with suppress(psutil.NoSuchProcess):
            decoder.send_signal(signal.SIGSTOP)
    assert start([*submit, "stop", "first"], tmp_path / "stop").wait(WAIT_SECONDS) == 0
    assert first.wait(WAIT_SECONDS) == 1
    assert "first ended as STOPPED" in log.read_text()
    until(lambda: not below(node, NAME))

    second = start([*submit, "--name", "second", *command(videos, out)], log)
    end(second, log)
    assert "8/8" in log.read_text(), "a job's progress is to be seen"
    assert contents(out) == expected
    status = tmp_path / "status"
    assert start([*submit, "status", "--json"], status).wait(WAIT_SECONDS) == 0
    rows = json.loads(status.read_text())
    assert [(row["id"], row["status"]) for row in rows] == [
        ("second", "SUCCEEDED"),
        ("first", "STOPPED"),
    ]
