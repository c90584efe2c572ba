from ray.train import ScalingConfig

from training import ray_workers


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
