"""The Slurm script, with stand-ins for Slurm's commands and for the programs of the environment."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

import infra

ROOT = Path(infra.__file__).parents[1]
SCRIPT = ROOT / "infra" / "slurm" / "train.sbatch"

SRUN = """#!/usr/bin/env bash
while [ "${1#--}" != "$1" ]; do case $1 in --nodelist=*) node=${1#*=};; esac; shift; done
case $1 in hostname) echo 10.0.0.1; exit;; esac
echo "$node $*" >> "$WORK/srun"
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in show) printf 'node1\\nnode2\\n';; *) echo "$*" >> "$WORK/scontrol";; esac
"""
RAY = """#!/usr/bin/env bash
exec sleep 60
"""
# Asked who is there it says two; as the driver it trains until it is asked to stop, or is done.
PYTHON = """#!/usr/bin/env bash
if [ "$1" = - ]; then echo "${NODES_ALIVE:-2}"; exit; fi
echo "$RAY_ADDRESS $NCCL_DEBUG $*" > "$WORK/driver"
stop() { sleep 0.5; echo saved > "$WORK/checkpoint"; exit 1; }
trap stop USR1
for _ in $(seq "${STEPS:-300}"); do sleep 0.1; done
exit "${CODE:-0}"
"""


@pytest.fixture
def job(tmp_path: Path):
    """Starts the script as Slurm would; gives the process and its folder."""
    started = []
    commands, venv = tmp_path / "bin", tmp_path / "venv" / "bin"
    for path, text in (
        (commands / "srun", SRUN),
        (commands / "scontrol", SCONTROL),
        (venv / "ray", RAY),
        (venv / "python", PYTHON),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "PATH": f"{commands}:{os.environ['PATH']}",
            "WORK": str(tmp_path),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_GPUS_ON_NODE": "8",
            "ANIMATOR_HOME": str(ROOT),
            "ANIMATOR_VENV": str(tmp_path / "venv"),
            **variables,
        }
        process = subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def wait_for(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


def test_script_is_shell() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_head_and_workers_start_and_the_driver_gets_the_arguments(job, tmp_path: Path) -> None:
    process = job("animator", "--out", "/data/my run", STEPS="1")
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 0, shown
    ran = (tmp_path / "srun").read_text().splitlines()
    assert any(line.startswith("node1 ray start --head") for line in ran)
    assert any(line.startswith("node2 ray start --address=10.0.0.1:6379") for line in ran)
    assert all("--num-gpus=8" in line for line in ran)
    given = (tmp_path / "driver").read_text()
    assert given == "10.0.0.1:6379 WARN -m infra train animator --out /data/my run\n"
    assert not (tmp_path / "scontrol").exists()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["limit", "preempted"])
def test_on_notice_it_waits_for_a_checkpoint_and_queues_again(job, tmp_path, number) -> None:
    process = job("animator")
    wait_for(tmp_path / "driver")
    time.sleep(0.3)
    process.send_signal(number)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 0, shown
    assert (tmp_path / "checkpoint").read_text() == "saved\n"
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"


def test_a_failure_of_its_own_is_not_tried_again(job, tmp_path: Path) -> None:
    process = job("animator", STEPS="1", CODE="2")
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 2, shown
    assert not (tmp_path / "scontrol").exists()


def test_it_does_not_queue_for_ever(job, tmp_path: Path) -> None:
    process = job("animator", SLURM_RESTART_COUNT="3", ANIMATOR_REQUEUES="3")
    wait_for(tmp_path / "driver")
    time.sleep(0.3)
    process.send_signal(signal.SIGUSR1)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "stopped after 3 attempts" in shown
    assert not (tmp_path / "scontrol").exists()


def test_nodes_that_do_not_join_are_said(job) -> None:
    process = job("animator", NODES_ALIVE="1", ANIMATOR_START_SECONDS="1")
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "did not join within 1 s" in shown
