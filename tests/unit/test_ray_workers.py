import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from ray.train import ScalingConfig
from toy_task import toy_config

from training import ray_workers
from training.journal import NOTES
from training.metrics import read_lines
from training.output import enter_folder
from training.stop_request import StopRequest
from training.task import Stopped, TrainingError


def callbacks(**arguments) -> set[str]:
    trainer = ray_workers._trainer_class()(
        print, scaling_config=ScalingConfig(num_workers=1), **arguments
    )
    return {type(callback).__name__ for callback in trainer._create_default_callbacks()}


def test_on_a_cluster_of_our_own_nobody_takes_the_workers_places_away(monkeypatch):
    # It would ask whichever cluster the machine has started last.
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert "PlacementGroupCleanerCallback" not in callbacks()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")
    assert "PlacementGroupCleanerCallback" in callbacks()


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    """A Ray with two CPUs and no GPU."""
    import ray

    with ExitStack() as stack:
        stack.enter_context(ray_workers._modules_of_driver())
        ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False)
        stack.callback(ray.shutdown)
        yield


def test_workers_that_fit_a_cluster_wait_for_nothing(two_cpus, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "the one that runs")
    assert ray_workers._resources(toy_config(workers=2), tmp_path)[0] is False
    assert not (tmp_path / NOTES).exists()


def test_cluster_without_room_is_waited_for_with_words_and_with_an_end(two_cpus, tmp_path):
    began = time.monotonic()
    with pytest.raises(TrainingError, match=r"3 workers with 1 CPU each: it has 2 CPUs.*lower"):
        ray_workers._wait_for_room(3, False, tmp_path, patience=2.5)
    assert 2.5 <= time.monotonic() - began < 60
    (note,) = read_lines(tmp_path / NOTES, "text")
    assert "Waiting: the Ray cluster has no room for 3 workers" in note["text"]
    with pytest.raises(
        TrainingError, match=r"1 worker with 1 CPU and 1 GPU each: it has 2 CPUs and 0 GPUs"
    ):
        ray_workers._wait_for_room(1, True, tmp_path, patience=0.1)


def test_run_that_waits_for_room_can_be_stopped(two_cpus, tmp_path):
    StopRequest(tmp_path).make()
    with pytest.raises(Stopped, match="before the start"):
        ray_workers._wait_for_room(3, False, tmp_path)


def test_workers_that_lost_their_place_for_good_are_said_in_a_sentence(tmp_path):
    from ray.train import ControllerError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    error = ControllerError(WorkerGroupStartupTimeoutError(num_workers=2))
    text = ray_workers._sentence(error, tmp_path, tmp_path)
    assert "found no room" in text
    assert "same command" in text


def test_machine_without_the_drivers_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A ValueError, which ends a run: another attempt of the same machine would end alike.
    with pytest.raises(ValueError, match=rf"{socket.gethostname()} cannot enter .*/not-there"):
        enter_folder(tmp_path / "not-there")
    (tmp_path / "there").mkdir()
    enter_folder(tmp_path / "there")
    assert Path.cwd().name == "there"
