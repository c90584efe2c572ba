"""Every preset on the same picture, clip and seed: time, memory and distance from `quality`.

Each runs in a process of its own, in turns. Ratios are to `quality` in the same run; frames are
compared as they were decoded, before any video encoder.

Shapes: T frames, H W pixels of the result.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from inference.engine import AnimationEngine
from inference.engine_factory import absolute_alignment
from inference.peak_memory import PeakMemory, host_now
from inference.perception import check_inputs
from inference.preset_quality import distance, open_judge
from inference.presets import PRESETS, preset
from inference.stages import Timings
from inference.timing import machine, summary, synchronise
from pipelines.images import read_image
from pipelines.overrides import apply_overrides, differences, to_dict

BASELINE = "quality"
PATHS = ("model", "reference", "driving")


@dataclass(frozen=True, kw_only=True)
class PresetBench:
    """What is measured, on which inputs.

    presets: besides `quality`, which always runs.
    frames: of the clip's beginning; None is all.
    changes: of the model's own settings, before a preset changes them.
    """

    model: Path
    reference: Path
    driving: Path
    presets: tuple[str, ...] = tuple(PRESETS)
    frames: int | None = None
    size: tuple[int, int] | None = None
    seed: int = 0
    repeats: int = 1
    changes: tuple[str, ...] = ()
    dtype: str = "auto"
    face: str = "auto"
    pose: str = "auto"
    alignment: str = "auto"

    def __post_init__(self) -> None:
        for name in self.presets:
            preset(name)
        for name in ("frames", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Got {name} {value}, but expected at least 1.")
        check_inputs(self.reference, self.driving)

    @property
    def rows(self) -> tuple[str, ...]:
        """The presets in order, the baseline first."""
        return (BASELINE, *(name for name in dict.fromkeys(self.presets) if name != BASELINE))


def bench_presets(bench: PresetBench, tell: Callable[[float, str], None]) -> dict[str, Any]:
    """Run each preset `repeats` times; returns rows of figures and which limits hold.

    Raises:
        ValueError: for inputs that cannot be animated; a preset that cannot run says why.
    """
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in bench.rows}
    # The processes that are started have another working folder.
    bench = replace(
        bench,
        **{name: getattr(bench, name).absolute() for name in PATHS},
        alignment=absolute_alignment(bench.alignment),
    )
    with tempfile.TemporaryDirectory() as scratch:
        task = Path(scratch)
        (task / "bench.json").write_text(json.dumps(asdict(bench), default=str))
        total = bench.repeats * len(runs)
        for number in range(total):
            turn, place = divmod(number, len(runs))
            name = bench.rows[(place + turn) % len(runs)]
            tell(number / total, name)
            runs[name].append(_run_alone(task, name))
        results = {name: np.load(task / f"{name}.npy") for name in runs}
        truth = results[BASELINE]
        apart = {name: distance(frames, truth) for name, frames in results.items()}
    base = runs[BASELINE]
    rows = {
        name: _costs(own, base) | _verdict(name, apart[name], own, base)
        for name, own in runs.items()
    }
    first = base[0]
    return {
        "bench": "presets",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": first["machine"],
        "settings": json.loads(json.dumps(asdict(bench), default=str)),
        "model": first["model"],
        "video": first["video"],
        "judge": first["judge"],
        "baseline": BASELINE,
        "rows": rows,
        "held": all(row["held"] for row in rows.values()),
    }


def _run_alone(task: Path, name: str) -> dict[str, Any]:
    """One run in a fresh process, or memory and warm caches of another would be in it."""
    done = subprocess.run(
        [sys.executable, "-m", "inference.preset_benchmark", str(task), name],
        cwd=Path(__file__).resolve().parents[1],
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"The preset {name} could not be run: {reason}")
    return json.loads((task / f"{name}.json").read_text())


def run_task(task: Path, name: str) -> None:
    """Animate once by a preset; frames and figures are written into the task's folder."""
    bench = _read(task / "bench.json")
    engine, inputs = _open(bench)
    pipeline = engine.pipeline
    own = apply_overrides(pipeline.settings, bench.changes)
    settings = preset(name).settings(own, pipeline.device.type)
    timings, memory = Timings(), PeakMemory()
    held = host_now()
    begun, worked = time.perf_counter(), time.process_time()
    stream = pipeline.stream(
        **inputs, size=bench.size, seed=bench.seed, settings=settings, timings=timings
    )
    frames = np.stack(list(timings.each("decoding", stream.frames())))
    synchronise(pipeline.device)
    seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - worked
    peaks = memory.record()
    stream.states.close()
    np.save(task / f"{name}.npy", frames)
    network = getattr(engine.perception.faces, "recogniser_path", None)
    judge = open_judge(
        pipeline.encoder,
        picture=inputs["reference"],
        face=inputs["face"],
        reference_pose=inputs["reference_pose"],
        driving_pose=inputs["driving_pose"],
        alignment=stream.alignment,
        framing=stream.framing,
        network=network,
    )
    quality = preset(BASELINE).settings(own, pipeline.device.type)
    devices = peaks.get("devices_mb", {})
    result = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "stages": timings.record(),
        "host_mb": peaks.get("host_mb"),
        "host_beyond_mb": peaks["host_mb"] - held / 1e6 if "host_mb" in peaks else None,
        "device_mb": max(devices.values()) if devices else None,
        "identity": judge and judge.similarity(frames),
        "judge": judge and judge.reader.network.name,
        "changes": differences(to_dict(quality), to_dict(settings)),
        "machine": machine(pipeline.device),
        "model": {
            "name": bench.model.name,
            "parameters": sum(p.numel() for p in pipeline.animator.parameters()),
            "steps": own.sampling.steps,
            "guidance": [own.guidance.min, own.guidance.max],
        },
        "video": {"frames": len(frames), "height": frames.shape[1], "width": frames.shape[2]},
    }
    (task / f"{name}.json").write_text(json.dumps(result))


def _read(path: Path) -> PresetBench:
    given = json.loads(path.read_text())
    paths = {name: Path(given[name]) for name in PATHS}
    texts = {name: tuple(given[name]) for name in ("presets", "changes")}
    size = None if given["size"] is None else tuple(given["size"])
    return PresetBench(**{**given, **paths, **texts, "size": size})


def _open(bench: PresetBench) -> tuple[AnimationEngine, dict[str, Any]]:
    """The engine, and what it sees in the inputs: the same for all presets, so it is not timed."""
    engine = AnimationEngine(
        bench.model, bench.face, bench.pose, bench.alignment, dtype=bench.dtype
    )
    seen = engine.perception
    image, info = read_image(bench.reference), seen.probe(bench.driving)
    face = seen.face(bench.reference, image, 1)
    driving = seen.driving(bench.driving, info, seen.frames(bench.driving, info))
    part = slice(bench.frames)
    return engine, {
        "reference": image,
        "reference_pose": seen.reference(bench.reference, image, face),
        "driving_pose": replace(
            driving, keypoints=driving.keypoints[part], score=driving.score[part]
        ),
        "fps": info.fps,
        "face": face,
        "faces": seen.faces_in(bench.reference, image),
    }


def _costs(own: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds and memory, as ratios to those of the baseline of the same round."""

    def each(name: str, runs: list[dict[str, Any]]) -> list[float]:
        return [run[name] for run in runs]

    stages = {stage: [run["stages"].get(stage, 0.0) for run in own] for stage in own[0]["stages"]}
    cpu = summary(each("cpu_seconds", own), each("cpu_seconds", base))
    row = {
        **summary(each("seconds", own), each("seconds", base)),
        # On a machine with other work to do, what the run itself took of the processor.
        "cpu_seconds": cpu["seconds"],
        "cpu_ratio": cpu["ratio"],
        "stages": {stage: round(statistics.median(times), 3) for stage, times in stages.items()},
    }
    for name in ("host_mb", "host_beyond_mb", "device_mb"):
        if own[0][name] is not None and base[0][name] is not None:
            most, reference = (statistics.median(each(name, runs)) for runs in (own, base))
            row[name], row[f"{name}_ratio"] = round(most, 1), round(most / reference, 4)
    return row


def _verdict(
    name: str, apart: dict[str, float], own: list[dict[str, Any]], base: list[dict[str, Any]]
) -> dict[str, Any]:
    """Distance from the baseline, and whether the preset's limits hold."""
    alike, reference = own[-1]["identity"], base[-1]["identity"]
    lost = None if alike is None or reference is None else reference - alike
    broken = preset(name).limits.broken(apart["psnr"], lost)
    return {
        **{key: round(value, 2) for key, value in apart.items()},
        "identity": None if alike is None else round(alike, 4),
        "identity_lost": None if lost is None else round(lost, 4),
        "limits": asdict(preset(name).limits),
        "broken": broken,
        "held": not broken,
        "changes": own[-1]["changes"],
    }


if __name__ == "__main__":
    try:
        run_task(Path(sys.argv[1]), sys.argv[2])
    except ValueError as error:
        sys.exit(str(error))
