"""Face optimisation measured: seconds, memory, similarity raised and background changed.

Rows are ways of refining the same prediction towards the same face, each in a process of its own,
in turns. All are judged by the full decode of what they made, with faces cut out where they are
known to be.

Shapes: T frames, C latent channels, h w latent size, H W pixels.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from animator.latents import TemporalVAE
from inference.conditioning import to_frames, to_tensor
from inference.faces.benchmark_clip import FaceClip, fitted_codec, read_clip
from inference.faces.benchmark_task import as_tensors
from inference.faces.config import FaceOptimizationConfig
from inference.faces.pieces import pieces_of
from inference.faces.similarity import FaceReader, arcface, similarities
from inference.timing import machine, summary
from pipelines.faces import InsightFaceBackend
from pipelines.models import locate_face_pack
from pipelines.overrides import to_dict

BASELINE = "exact"
AROUND = 0.25  # of the face's size, left out beside it where the background is judged


@dataclass(frozen=True, kw_only=True)
class HjbBench:
    """What is measured."""

    video: Path  # with a face, whose frames are the prediction
    reference: Path  # with the face that they are to have
    work: Path | None = None  # where the fitted decoder is kept
    frames: int = 16
    height: int = 576
    width: int = 1024
    face: int = 112  # pixels of the face's height
    iterations: int = 10
    chunk: int = 4  # frames decoded with gradient at a time, by all rows but the published one
    portion: int = 4  # frames of a pass over whole frames, which crops borrow from
    published_frames: int = 2  # of the row that keeps all frames in one graph
    repeats: int = 1
    fit_steps: int = 400
    rows: tuple[str, ...] = ("published", "exact", "crop", "crop_alone", "key_frames")

    def __post_init__(self) -> None:
        for name in (
            "frames",
            "iterations",
            "chunk",
            "portion",
            "published_frames",
            "repeats",
            "fit_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"Got {name} {getattr(self, name)}, but expected at least 1.")
        if self.height % 8 or self.width % 8 or min(self.height, self.width) < 128:
            raise ValueError(
                f"Got {self.height} x {self.width}, but expected multiples of 8 from 128."
            )
        unknown = set(self.rows) - set(_configs(self))
        if unknown or BASELINE not in self.rows:
            raise ValueError(
                f"Got rows {', '.join(self.rows)}, but expected {BASELINE} and others of "
                f"{', '.join(_configs(self))}."
            )


def _configs(bench: HjbBench) -> dict[str, FaceOptimizationConfig]:
    own = FaceOptimizationConfig(
        mode="crop",
        iterations=bench.iterations,
        chunk=bench.chunk,
        portion=bench.portion,
        min_gain=0.0,
        detect_every=0,
        steps=1,
    )
    return {
        "published": replace(own, mode="published"),
        "exact": replace(own, mode="exact"),
        "crop": own,
        "crop_alone": replace(own, statistics="crop"),
        "key_frames": replace(own, key_frames=0.5),
    }


def bench_hjb(
    bench: HjbBench, tell: Callable[[float, str], None] = lambda share, what: None
) -> dict[str, Any]:
    """One denoising step's refinement, in several ways.

    Returns:
        `rows`: seconds of a run, and the ratio of seconds a frame to `exact` of the same round;
        peak memory beyond what the models and the clip take, and its ratio; similarity before and
        after and its raise as a share of `exact`'s, None where that raised nothing; mean change of
        the background in grey levels (0..255). How the decoder was fitted.

    Raises:
        ValueError: for pictures without faces, or without a recognition network.
    """
    pack = locate_face_pack()
    if pack is None:
        raise ValueError("No InsightFace pack was found: set ANIMATOR_MODELS or pull one.")
    detector = InsightFaceBackend(pack)
    size = (bench.height, bench.width)
    clip = read_clip(
        bench.video, bench.reference, detector, frames=bench.frames, size=size, face=bench.face
    )
    reader = FaceReader(arcface(detector.recogniser_path, torch.device("cpu")))
    with tempfile.TemporaryDirectory() as scratch:
        folder = bench.work or Path(scratch)
        codec, fit = fitted_codec(
            clip,
            folder,
            steps=bench.fit_steps,
            tell=lambda share: tell(0.2 * share, "fitting a decoder"),
        )
        with torch.no_grad():
            latents = torch.cat([codec.encode(to_tensor(f)[None]) for f in clip.frames])
            wanted = reader.embed(
                to_tensor(clip.reference)[None],
                torch.from_numpy(clip.reference_face.landmarks)[None],
                torch.from_numpy(clip.reference_face.box)[None],
            )
        task = Path(scratch) / "task"
        task.mkdir()
        codec.vae.save_pretrained(str(task / "vae"))
        tensors = {"latents": latents, "wanted": wanted, **as_tensors(clip.places)}
        save_file(tensors, str(task / "task.safetensors"))
        measured = _rounds(bench, task, detector.recogniser_path, tell)
        shown = codec.decode(latents)
        judged = {
            name: _judge(codec, reader, clip, latents, shown, wanted, runs[-1]["latents"])
            for name, runs in measured.items()
        }
    rows = {
        name: _row(runs, measured[BASELINE], judged[name], judged[BASELINE])
        for name, runs in measured.items()
    }
    return {
        "bench": "hjb",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(torch.device("cpu")),
        "settings": {key: str(v) if isinstance(v, Path) else v for key, v in asdict(bench).items()},
        "decoder": {
            "about": "a small AutoencoderKLTemporalDecoder fitted to the clip, not published",
            "channels": list(codec.vae.config["block_out_channels"]),
            **fit,
        },
        "recogniser": detector.name,
        "crop_cells": _crop_cells(reader, clip, bench),
        "baseline": BASELINE,
        "rows": rows,
    }


def _row(
    runs: list[dict[str, Any]],
    base: list[dict[str, Any]],
    judged: dict[str, float],
    base_judged: dict[str, float],
) -> dict[str, Any]:
    """A way's figures beside the baseline's, from the runs of both in the same rounds."""

    def a_frame(of: list[dict[str, Any]], key: str) -> list[float]:
        return [run[key] / run["frames"] for run in of]

    peak, base_peak = (statistics.median(run["peak_gb"] for run in of) for of in (runs, base))
    # On a machine with other work to do, what the row itself took of the processor.
    used = zip(a_frame(runs, "cpu_seconds"), a_frame(base, "cpu_seconds"), strict=True)
    times = summary(a_frame(runs, "seconds"), a_frame(base, "seconds"))
    raised = base_judged["raised"]
    return {
        **{name: value for name, value in times.items() if name.startswith("ratio")},
        "seconds": round(statistics.median(run["seconds"] for run in runs), 4),
        "cpu_seconds": round(statistics.median(run["cpu_seconds"] for run in runs), 2),
        "cpu_ratio": round(statistics.median(own / other for own, other in used), 4),
        "peak_gb": round(peak, 3),
        "memory_ratio": round(peak / base_peak, 4),
        "frames": runs[-1]["frames"],
        "steps": runs[-1]["record"]["steps"],
        **judged,
        "raise_ratio": round(judged["raised"] / raised, 4) if raised > 0 else None,
    }


def _rounds(
    bench: HjbBench, task: Path, network: Path, tell: Callable[[float, str], None]
) -> dict[str, list[dict[str, Any]]]:
    """Each row's runs; the order turns from round to round."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in bench.rows}
    done, total = 0, bench.repeats * len(bench.rows)
    for turn in range(bench.repeats):
        shift = turn % len(bench.rows)
        for name in bench.rows[shift:] + bench.rows[:shift]:
            tell(0.2 + 0.8 * done / total, name)
            frames = bench.published_frames if name == "published" else bench.frames
            job = {
                "config": to_dict(_configs(bench)[name]),
                "frames": min(frames, bench.frames),
                "network": str(network),
                "threads": torch.get_num_threads(),
            }
            (task / "job.json").write_text(json.dumps(job))
            # A process of its own: memory that another row freed would hide this one's peak.
            subprocess.run(
                [sys.executable, "-m", "inference.faces.benchmark_task", str(task)],
                check=True,
                cwd=Path(__file__).resolve().parents[2],
            )
            run = json.loads((task / "result.json").read_text())
            run["latents"] = load_file(str(task / "result.safetensors"))["latents"]
            found[name].append(run)
            done += 1
    return found


def _judge(
    codec: TemporalVAE,
    reader: FaceReader,
    clip: FaceClip,
    latents: Tensor,
    before: Tensor,
    wanted: Tensor,
    refined: Tensor,
) -> dict[str, float]:
    """Similarity of the full decode, and what changed outside of the faces."""
    count = len(refined)
    # Where fewer frames were refined, what they are compared with is a clip of those.
    before = before if count == len(latents) else codec.decode(latents[:count])
    after = codec.decode(refined)
    places = clip.places
    points, boxes = (torch.from_numpy(x[:count, 0]) for x in (places.landmarks, places.boxes))
    with torch.no_grad():
        first, last = (
            float(similarities(reader.embed(x, points, boxes), wanted).mean())
            for x in (before, after)
        )
    difference = np.abs(to_frames(after).astype(np.float32) - to_frames(before)).mean(-1)
    areas = reader.area(places.landmarks[:count, 0], places.boxes[:count, 0], places.size)
    outside = np.ones(difference.shape, bool)
    for frame, (x0, y0, x1, y1) in enumerate(areas):
        margin = AROUND * (x1 - x0)
        rows = slice(max(0, int(y0 - margin)), int(y1 + margin))
        outside[frame, rows, max(0, int(x0 - margin)) : int(x1 + margin)] = False
    return {
        "similarity_before": round(first, 4),
        "similarity_after": round(last, 4),
        "raised": round(last - first, 4),
        "background_change": round(float(difference[outside].mean()), 4),
        "face_change": round(float(difference[~outside].mean()), 4),
        "cells_changed": round(float((refined != latents[:count]).any(1).float().mean()), 4),
    }


def _crop_cells(reader: FaceReader, clip: FaceClip, bench: HjbBench) -> list[list[int]]:
    """Sizes of the crops, in latent cells."""
    config = _configs(bench)["crop"]
    pieces = pieces_of(clip.places, range(bench.frames), reader, config, 8)
    return sorted({(face.piece.height, face.piece.width) for face in pieces})  # type: ignore
