"""The simulated cluster keeps to arithmetic where arithmetic is known."""

import pytest

from pipelines.curation.simulate import SimulatedCluster, simulate

TIMES = [{"decode": 2.0, "models": 6.0}]


def test_one_core_takes_the_sum_of_all_times() -> None:
    one = SimulatedCluster(nodes=1, cores=1, commit_seconds=0)
    found = simulate(TIMES, 80, one)
    assert found["hours"] == pytest.approx(80 * 8 / 3600, abs=1e-3)
    assert found["core_utilisation"] == 1.0


def test_even_work_grows_with_the_cores() -> None:
    many = SimulatedCluster(nodes=10, cores=4, commit_seconds=0)
    found = simulate(TIMES, 40 * 8 * 5, many)
    assert found["hours"] == pytest.approx(5 * 8 * 8 / 3600, abs=1e-3)


def test_gpus_are_the_limit_where_too_many_cores_feed_them() -> None:
    fed = SimulatedCluster(nodes=1, cores=16, gpus=1, gpu_speed=6.0, commit_seconds=0)
    found = simulate(TIMES, 1600, fed)
    assert found["cores_per_gpu"] == 2.0
    assert found["gpu_utilisation"] > 0.97
    assert found["hours"] == pytest.approx(1600 / 3600, rel=0.03)


def test_lost_nodes_cost_what_they_were_at() -> None:
    calm = simulate(TIMES, 4000, SimulatedCluster(nodes=10, cores=4))
    spot = simulate(TIMES, 4000, SimulatedCluster(nodes=10, cores=4, losses_per_node_hour=6))
    assert calm["lost_share"] == 0
    assert 0 < spot["lost_share"] < 0.3
    assert spot["hours"] > calm["hours"]


def test_what_a_gpu_did_is_lost_with_its_node_too() -> None:
    spot = SimulatedCluster(
        nodes=4, cores=3, gpus=1, gpu_speed=2.0, losses_per_node_hour=6, commit_seconds=0
    )
    found = simulate([{"models": 8.0}], 4000, spot)
    at_work = found["gpu_utilisation"] * found["hours"] * 3600 * spot.nodes
    assert found["lost_share"] == pytest.approx(1 - 4000 * 4 / at_work, abs=2e-3)
    assert found["lost_share"] > 0.03
    assert found["core_utilisation"] == 0, "the GPUs did it all"


def test_commits_are_lost_with_their_node_too() -> None:
    spot = SimulatedCluster(
        nodes=1, cores=1, losses_per_node_hour=6, commit_seconds=60, return_seconds=1e-6
    )
    found = simulate([{"decode": 0.001}], 4000, spot)
    kept = 4000 * 0.001 + 500 * 60
    assert found["lost_share"] == pytest.approx(1 - kept / (found["hours"] * 3600), abs=2e-3)
    assert found["lost_share"] > 0.02


def test_work_of_a_lost_node_holds_up_nothing_when_a_new_one_has_come() -> None:
    # Seven wait 10 s each in the line of a GPU that is lost every ten minutes.
    spot = SimulatedCluster(
        nodes=1, cores=8, gpus=1, gpu_speed=1, losses_per_node_hour=6, return_seconds=1
    )
    found = simulate([{"models": 10.0}], 4000, spot)
    assert found["gpu_utilisation"] > 0.98
    assert found["hours"] == pytest.approx(4000 * 10 / 3600 / (1 - found["lost_share"]), rel=0.01)


def test_the_same_seed_gives_the_same_run() -> None:
    cluster = SimulatedCluster(nodes=3, losses_per_node_hour=2)
    times = [{"decode": 1.0}, {"decode": 5.0, "models": 2.0}]
    assert simulate(times, 500, cluster, seed=1) == simulate(times, 500, cluster, seed=1)


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one source"):
        simulate([], 10)
