"""Collects what the demonstration left behind and fills the report with it."""

import platform
from pathlib import Path
from typing import Any

import numpy as np

from infra.demo.report import (
    embed_file,
    embed_image,
    minutes,
    strip,
    write_report,
)
from infra.demo.stages import Stages

COLUMNS = 8
SCORES = {
    "psnr_person": "PSNR person (dB)",
    "ssim_person": "SSIM person",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
}


def build_report(
    out: Path,
    *,
    model: Path,
    curation: dict[str, Any],
    record: dict[str, Any],
    stages: Stages,
    quick: bool,
) -> dict[str, Any]:
    """Write `out/report.html` and `out/strip.png`; returns the summary and the scores."""
    from inference.metrics import compare
    from pipelines.images import read_image
    from pipelines.video import decode

    material = out / "material"
    generated = decode(out / "animation.mp4")
    height, width = generated.shape[1:3]
    truth = decode(material / "truth.mp4", size=(height, width))
    driving = decode(material / "driving.mp4", size=(height, width))
    count = min(len(generated), len(truth))
    generated, truth, driving = generated[:count], truth[:count], driving[:count]
    reference = _resized(read_image(material / "reference.png"), (height, width))
    repeated = np.broadcast_to(reference, truth.shape)
    boxes = _pose(material / "truth.pose.npz")["boxes"][:count, 0]
    scores = {
        "repeat the picture": compare(repeated, truth, boxes),
        "animator": compare(generated, truth, boxes),
    }
    poses, distances = _poses(material, model, (height, width))
    rows = [
        ("driving video", driving),
        ("generated", generated),
        ("ground truth", truth),
    ]
    _save_strip(out / "strip.png", [frames for _, frames in rows])
    times = stages.seconds()
    total = sum(seconds for _, seconds in times.values())
    better = scores["animator"]["psnr_person"] - scores["repeat the picture"]["psnr_person"]
    summary = (
        f"{curation['kept']} videos kept and {curation['rejected']} turned away, two models "
        f"trained, one portrait animated in {minutes(total)}; inside the person's box the result "
        f"is {abs(better):.1f} dB {'closer to' if better >= 0 else 'further from'} the truth than "
        f"the picture repeated."
        + (" A quick run: it shows the chain, not its quality." if quick else "")
    )
    write_report(
        out / "report.html",
        {
            "title": "A portrait learns to dance",
            "summary": summary,
            "videos": _videos(out),
            "score_names": list(SCORES.values()),
            "scores": [
                {
                    "name": name,
                    "cells": [f"{row[key]:.{2 if 'psnr' in key else 3}f}" for key in SCORES],
                    "best": name == "animator",
                }
                for name, row in scores.items()
            ],
            "score_note": f"{count} frames of {width} × {height} pixels; the baseline shows the "
            "portrait in every frame. The person's box comes from the ground truth.",
            "funnel": [
                {"count": curation["kept"] + curation["rejected"], "name": "videos"},
                {"count": curation["rejected"], "name": "turned away"},
                {"count": curation["kept"], "name": "kept for training"},
            ],
            "clips": _clips(out, curation["rows"]),
            "curves": [
                _training_curve(out, "alignment", "Alignment loss (eq. 12)"),
                _training_curve(out, "animator", "Denoising loss (eq. 25)"),
            ],
            "pose_rows": [{"name": n, "image": embed_image(strip(f, COLUMNS))} for n, f in poses],
            "distances": distances,
            "frame_rows": [{"name": n, "image": embed_image(strip(f, COLUMNS))} for n, f in rows],
            "warnings": record.get("warnings", []),
            "timing": {name: minutes(seconds) for name, (_, seconds) in times.items()},
            "times": [
                {"name": title, "text": minutes(s), "percent": round(80 * s / max(total, 1e-9), 1)}
                for title, s in times.values()
            ],
            "total": minutes(total),
            "machine": _machine(),
            "credits": [],
        },
    )
    return {"summary": summary, "scores": scores}


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from pipelines.framing import fit

    return fit(image.shape[:2], size).image(image)


def _pose(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _poses(
    material: Path, model: Path, size: tuple[int, int]
) -> tuple[list[tuple[str, np.ndarray]], list[dict[str, Any]]]:
    """Drawn skeletons (T, H, W, 3) before and after alignment, and their distances (Table III).

    The recorded frames have the shape of `size`, so keypoints in 0..1 need no mapping.
    """
    from animator.keypoints import VISIBLE
    from animator.skeleton import draw_pose
    from animator.weights import load_alignment
    from inference.retarget import retarget, unaligned

    reference, driving, truth = (
        _pose(material / f"{name}.pose.npz") for name in ("reference", "driving", "truth")
    )
    sizes, seen = (size, size), (VISIBLE, VISIBLE)
    still = (reference["keypoints"][0, 0], reference["score"][0, 0])
    moving = (driving["keypoints"], driving["score"])
    found = {
        "as it came": unaligned(driving["keypoints"], sizes).keypoints,
        "closed form": retarget(None, still, moving, sizes, seen).keypoints,
    }
    if (block := load_alignment(model)) is not None:
        found["learned"] = retarget(block, still, moving, sizes, seen).keypoints
    drawn = []
    for name, keypoints in (*found.items(), ("ground truth", truth["keypoints"])):
        pairs = zip(keypoints[:, 0], truth["score"][:, 0], strict=True)
        drawn.append((name, np.stack([draw_pose(k, s, *size) for k, s in pairs])))
    shape = np.array([size[1], size[0]]) / max(size)
    distances = [
        float(np.linalg.norm((keypoints - truth["keypoints"]) * shape, axis=-1).mean())
        for keypoints in found.values()
    ]
    rows = [
        {"name": name, "value": f"{value:.4f}", "best": value == min(distances)}
        for name, value in zip(found, distances, strict=True)
    ]
    return drawn, rows


def _videos(out: Path) -> list[dict[str, Any]]:
    material = out / "material"
    return [
        {
            "name": "Portrait",
            "note": "the picture given",
            "image": embed_file(material / "reference.png"),
        },
        {
            "name": "Driving video",
            "note": "another actor, standing elsewhere",
            "video": embed_file(material / "driving.mp4"),
        },
        {
            "name": "Generated",
            "note": "aligned and animated",
            "video": embed_file(out / "animation.mp4"),
            "big": True,
        },
        {
            "name": "Ground truth",
            "note": "the same motion, recorded",
            "video": embed_file(material / "truth.mp4"),
        },
    ]


def _clips(out: Path, rows: dict[str, Any]) -> list[dict[str, str]]:
    from pipelines.curation.filters import REASONS
    from pipelines.video import iter_frames

    shown = []
    for name, row in sorted(rows.items(), key=lambda item: item[1]["verdict"] != "kept"):
        path = out / "material" / "clips" / f"{name}.mp4"
        frame = next(iter(iter_frames(path, start=1.0, max_side=200)))
        shown.append(
            {
                "name": name,
                "verdict": row["verdict"],
                "reason": ", ".join(REASONS[r] for r in row["reasons"]) or "good",
                "thumbnail": embed_image(frame, kind="JPEG"),
            }
        )
    return shown


def _training_curve(out: Path, kind: str, title: str) -> str:
    from training.curve import loss_curve
    from training.metrics import read_metrics

    records = read_metrics(out / "runs" / kind / "metrics.jsonl")
    samples, losses = ([record[key] for record in records] for key in ("samples_seen", "loss"))
    return loss_curve(samples, losses, title, transparent=True)


def _save_strip(path: Path, rows: list[np.ndarray]) -> None:
    """The rows of the report's animation, one above the other, for the README."""
    from PIL import Image

    gap = np.full((4, strip(rows[0], COLUMNS).shape[1], 3), 255, np.uint8)
    pieces = [piece for row in rows for piece in (strip(row, COLUMNS), gap)]
    picture = Image.fromarray(np.concatenate(pieces[:-1]))
    picture.save(path)


def _machine() -> str:
    import os

    return f"{os.cpu_count()} CPU cores, {platform.system()}"
