"""What curation costs, beside named baselines in the same run.

Four measures: where the time of a real run goes; everything that needs no model beside
PySceneDetect alone; two workers beside one; and what a cluster would need, played through with the
times that were measured.
"""

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import psutil

from pipelines.curation.config import CurationConfig
from pipelines.curation.plan import load_plan
from pipelines.curation.report import stats
from pipelines.curation.simulate import SimulatedCluster, simulate
from pipelines.curation.source import Job, SourceWork, clip_spans
from pipelines.curation.timings import iter_timings, read_timings
from pipelines.video import encode, iter_frames, probe

# Decoding, encoding and networks: what a run is for. The rest is glue.
DECODE_AND_MODELS = ("scan", "encode", "models", "annotate")
_SAMPLE_SECONDS = 0.25
_EQUAL_SECONDS = 3.0

Tell = Callable[[str], Any]


def bench_stages(
    videos: Sequence[str],
    config: CurationConfig | None = None,
    *,
    workers: int = 1,
    tell: Tell = lambda text: None,
) -> dict[str, Any]:
    """Curate `videos` once and say where the time went.

    Returns:
        `clips_per_second` and `sources_per_second` of the whole run and of its steady part, `times_
        real_time_per_core`, `stages` (seconds and share of all the workers' time, `glue` being what
        no stage accounts for), `decode_and_models` (their share) and `peak_gb` over all processes.
    """
    from pipelines.curation.pipeline import Progress, curate

    moments: list[tuple[float, int]] = []

    def note(state: Progress) -> None:
        if state.stage == "work":
            moments.append((time.perf_counter(), state.done))

    tell("curating")
    with tempfile.TemporaryDirectory(prefix="bench-") as name, _Memory() as memory:
        out = Path(name) / "out"
        began = time.perf_counter()
        summary = curate(videos, out, config, workers=workers, progress=note)
        whole = time.perf_counter() - began
        found, times = stats(out), read_timings(out)
    steady = _steady_seconds(moments)
    at_work = steady * summary.workers
    stages = {row["stage"]: row["seconds"] for row in times["stages"]}
    stages["glue"] = max(0.0, at_work - sum(stages.values()))
    total = sum(stages.values())
    real = sum(stages[stage] for stage in DECODE_AND_MODELS if stage in stages)
    return {
        "sources": found["sources"],
        "clips_kept": found["clips_kept"],
        "workers": summary.workers,
        "seconds": round(whole, 2),
        "steady_seconds": round(steady, 2),
        "clips_per_second": round((found["clips_kept"] + found["clips_rejected"]) / steady, 3),
        "sources_per_second": round(found["sources"] / steady, 3),
        "times_real_time_per_core": round(found["seconds_seen"] / at_work, 3),
        "decode_and_models": round(real / total, 4),
        "stages": {
            stage: {"seconds": round(spent, 2), "share": round(spent / total, 4)}
            for stage, spent in sorted(stages.items(), key=lambda item: -item[1])
        },
        "peak_gb": round(memory.peak / 1e9, 3),
        "models": found["models"],
    }


def bench_shots(
    videos: Sequence[Path],
    config: CurationConfig | None = None,
    *,
    repeats: int = 3,
    tell: Tell = lambda text: None,
) -> dict[str, Any]:
    """All that needs no model (hash, probe, scan, quality, camera) beside PySceneDetect alone.

    Both decode on one thread. The two take turns on each file; a file's figures are the medians of
    its rounds, and the ratio is of their sums. CPU seconds count the decoder's threads too, should
    it start any all the same.
    """
    config = config or CurationConfig()
    os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "threads;1")
    own_wall: list[float] = []
    own_cpu: list[float] = []
    base_wall: list[float] = []
    base_cpu: list[float] = []
    seconds = 0.0
    for path in videos:
        tell(path.name)
        rounds: dict[str, list[tuple[float, float]]] = {"own": [], "base": []}
        calls = {"own": lambda: _without_models(path, config), "base": lambda: _alone(path)}  # noqa: B023
        for turn in range(repeats):
            for name in list(calls)[:: 1 if turn % 2 else -1]:
                rounds[name].append(_timed(calls[name]))
        own_wall.append(statistics.median(wall for wall, _ in rounds["own"]))
        own_cpu.append(statistics.median(cpu for _, cpu in rounds["own"]))
        base_wall.append(statistics.median(wall for wall, _ in rounds["base"]))
        base_cpu.append(statistics.median(cpu for _, cpu in rounds["base"]))
        seconds += probe(path).seconds
    per_file = sorted(own / base for own, base in zip(own_cpu, base_cpu, strict=True))
    return {
        "baseline": "scenedetect.detect(path, AdaptiveDetector())",
        "files": len(own_wall),
        "video_seconds": round(seconds, 1),
        "repeats": repeats,
        "own": {"wall": round(sum(own_wall), 3), "cpu": round(sum(own_cpu), 3)},
        "scenedetect": {"wall": round(sum(base_wall), 3), "cpu": round(sum(base_cpu), 3)},
        "ratio_wall": round(sum(own_wall) / sum(base_wall), 4),
        "ratio_cpu": round(sum(own_cpu) / sum(base_cpu), 4),
        "ratio_cpu_files": {
            "lowest": round(per_file[0], 3),
            "median": round(statistics.median(per_file), 3),
            "highest": round(per_file[-1], 3),
        },
    }


def bench_scaling(
    videos: Sequence[Path],
    config: CurationConfig | None = None,
    *,
    sources: int = 24,
    repeats: int = 2,
    tell: Tell = lambda text: None,
) -> dict[str, Any]:
    """Throughput of two single-threaded workers beside one, on equal work.

    `videos` are cut into `sources` clips of 3 seconds with bytes of their own, so that what is left
    at the end is the same for both. Starting Ray and the models does not count.
    """
    from pipelines.curation.pipeline import Progress, curate
    from pipelines.overrides import apply_overrides

    config = apply_overrides(config or CurationConfig(), ["output.sources_per_shard=1"])
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        tell("cutting equal clips")
        count = _equal_clips(videos, folder / "clips", sources)
        for turn in range(repeats):
            for workers in (1, 2) if turn % 2 == 0 else (2, 1):
                tell(f"{workers} worker{'s' * (workers > 1)}, round {turn + 1}")
                moments: list[tuple[float, int]] = []

                def note(state: Progress, moments: list[tuple[float, int]] = moments) -> None:
                    if state.stage == "work":
                        moments.append((time.perf_counter(), state.done))

                out = folder / f"out-{workers}-{turn}"
                curate([str(folder / "clips")], out, config, workers=workers, progress=note)
                rates[workers].append(_rate(moments, workers))
    one, two = statistics.median(rates[1]), statistics.median(rates[2])
    return {
        "sources": count,
        "one_worker_per_second": round(one, 4),
        "two_workers_per_second": round(two, 4),
        "ratio": round(two / one, 4),
        "cores": os.cpu_count(),
    }


def bench_cluster(
    folder: Path, sources: int, cluster: SimulatedCluster, *, seed: int = 0
) -> dict[str, Any]:
    """Play a run of `sources` through with the stage times of the finished run in `folder`."""
    times = [seconds for name, seconds in iter_timings(folder) if not name.startswith("shard-")]
    if not times:
        raise ValueError(
            f"{folder} holds no stage times (timings.jsonl): give the folder of a finished run."
        )
    shard = load_plan(folder).sources_per_shard
    return {
        "measured_sources": len(times),
        "mean_seconds": round(sum(sum(one.values()) for one in times) / len(times), 3),
        **simulate(times, sources, cluster, sources_per_shard=shard, seed=seed),
        "cluster": asdict(cluster),
    }


class _Memory:
    """The most memory that this process and all below it had at once, in bytes, and Ray's store."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_Memory":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        own = psutil.Process()
        while not self._stop.wait(_SAMPLE_SECONDS):
            total = 0
            for process in [own, *own.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.Error:
                    continue
            self.peak = max(self.peak, total)


def _timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def _without_models(path: Path, config: CurationConfig) -> None:
    from pipelines.shards import sha256_file

    with tempfile.TemporaryFile() as frames:
        job = Job(id="0" * 16, sha256=sha256_file(path), path=str(path), staging="", config=config)
        work = SourceWork(job, _NoModels(), frames.fileno())
        video = probe(path, work.limits)
        scan = work.scan(video)
        for span in clip_spans(scan.shots, config):
            sampled = scan.samples.of(*span)
            work.cheap_scores(sampled, span, len(scan.shots.cuts), video)
            work.camera_scores(sampled, None)


class _NoModels:
    def ask(self, kind: str, data: Any) -> Any:
        """Never: what is measured needs no model."""
        raise RuntimeError(f"a model was asked for ({kind})")


def _alone(path: Path) -> None:
    from scenedetect import AdaptiveDetector, detect

    detect(str(path), AdaptiveDetector())


def _equal_clips(videos: Sequence[Path], folder: Path, count: int) -> int:
    """Write `count` clips of 3 seconds, 320 lines at 24 a second, each with bytes of its own."""
    folder.mkdir()
    frames_each = int(_EQUAL_SECONDS * 24)
    made = 0
    while made < count:
        before = made
        for path in videos:
            frames = iter_frames(path, fps=24, max_side=568)
            for part in range(4):
                chunk = list(islice(frames, frames_each))
                if len(chunk) < frames_each or made == count:
                    break
                # Another quality, so that a clip that comes again is another file.
                encode(folder / f"{made:03d}.mp4", chunk, fps=24, crf=18 + made % 7 + part)
                made += 1
        if made == before:
            raise ValueError(f"none of the videos lasts {_EQUAL_SECONDS:g} s; give longer ones.")
    return made


def _steady_seconds(moments: Sequence[tuple[float, int]]) -> float:
    """From the first look at which something was at work to the last source done."""
    last = max(done for _, done in moments)
    end = min(when for when, done in moments if done == last)
    return max(end - _first_work(moments), 1e-6)


def _first_work(moments: Sequence[tuple[float, int]]) -> float:
    """When work began: as long before the first source was done as a source takes on average."""
    done = sorted({count: when for when, count in reversed(moments)}.items())
    if len(done) < 3:
        return moments[0][0]
    (first, when), (last, end) = done[1], done[-1]
    each = (end - when) / max(1, last - first)
    return max(moments[0][0], when - each * first)


def _rate(moments: Sequence[tuple[float, int]], workers: int) -> float:
    """Sources a second between the first ones done and the last."""
    done = sorted({count: when for when, count in reversed(moments)}.items())
    (first, start), (last, end) = next(pair for pair in done if pair[0] >= workers), done[-1]
    return (last - first) / (end - start)
