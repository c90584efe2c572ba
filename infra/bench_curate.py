"""The measures of `animator bench curate`, chosen and run one after the other."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARTS = ("stages", "shots", "scaling", "plan", "cluster")


@dataclass(frozen=True, kw_only=True)
class CurateBench:
    """What to measure; see `animator bench curate --help`."""

    videos: tuple[Path, ...]
    parts: tuple[str, ...]
    workers: int
    repeats: int
    run: Path | None
    sources: int
    nodes: int
    cores: int
    gpus: int
    gpu_speed: float
    losses: float
    settings: tuple[str, ...]

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown:
            raise ValueError(f"got the part {unknown[0]!r}, expected some of {', '.join(PARTS)}.")
        if not self.videos and set(self.parts) & {"stages", "shots", "scaling"}:
            raise ValueError("got no videos to measure on; give a folder or files of them.")
        if "cluster" in self.parts and self.run is None:
            raise ValueError("got no --run for `cluster`; give the folder of a finished run.")


def measure(config: CurateBench, tell: Callable[[str], Any]) -> dict[str, Any]:
    """The figures of every part that was asked for, by part, and the machine."""
    import torch

    from inference.timing import machine
    from pipelines.curation import benchmark
    from pipelines.curation.config import CurationConfig
    from pipelines.curation.plan_benchmark import measure_planning
    from pipelines.curation.simulate import SimulatedCluster
    from pipelines.overrides import apply_overrides

    curation = apply_overrides(CurationConfig(), config.settings)
    files = _files(config) if config.videos else []
    result: dict[str, Any] = {"machine": machine(torch.device("cpu"))}
    if "stages" in config.parts:
        result["stages"] = benchmark.bench_stages(
            [str(path) for path in files], curation, workers=config.workers, tell=tell
        )
    if "shots" in config.parts:
        result["shots"] = benchmark.bench_shots(files, curation, repeats=config.repeats, tell=tell)
    if "scaling" in config.parts:
        result["scaling"] = benchmark.bench_scaling(
            files, curation, repeats=config.repeats, tell=tell
        )
    if "plan" in config.parts:
        result["plan"] = measure_planning(config.sources, progress=tell)
    if "cluster" in config.parts and config.run is not None:
        cluster = SimulatedCluster(
            nodes=config.nodes,
            cores=config.cores,
            gpus=config.gpus,
            gpu_speed=config.gpu_speed,
            losses_per_node_hour=config.losses,
        )
        result["cluster"] = benchmark.bench_cluster(config.run, config.sources, cluster)
    return result


def _files(config: CurateBench) -> list[Path]:
    """The local videos that can be opened, since a damaged one has no baseline."""
    from pipelines.curation.sources import read_sources
    from pipelines.video import VideoError, probe

    found = []
    for uri in read_sources([str(path) for path in config.videos])["uri"].to_pylist():
        path = Path(uri)
        try:
            probe(path)
        except VideoError:
            continue
        found.append(path)
    if not found:
        raise ValueError("none of the videos can be opened; give some that can.")
    return found
