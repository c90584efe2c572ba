"""The demonstration: record, curate, train, align, animate, report.

Everything lies under one folder; a stage that is done is not done again. Heavy imports stay in
the stages, so that the first line appears at once.
"""

import time
from pathlib import Path
from typing import Any

from infra.console import note
from infra.demo.stages import Stages

FPS = 12
NUM_FRAMES = 60
SEED = 0
QUICK = {
    "alignment": ["optim.samples=64"],
    "animator": ["optim.samples=4", "checkpoint.every_samples=4"],
}
QUICK_STEPS = 2
# A filter of the curation that each bad clip must fail, by the name in `clips.TAKES`.
REASON = {
    "camera": "moving_camera",
    "length": "cut",
    "face": "no_face",
    "pose": "missing_keypoints",
}


class DemoError(RuntimeError):
    """The chain ran but did not do what it must; the message says what."""


def run_demo(out: Path, *, quick: bool = False) -> dict[str, Any]:
    """Run or continue the demonstration in `out` and write `out/report.html`.

    Returns a summary: the report's path, scores against the ground truth, seconds by stage.
    Raises DemoError where a stage did not do what it must, ValueError where `out` holds a
    demonstration with other settings.
    """
    from infra.demo.pages import build_report

    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    stages = Stages(out, settings={"quick": quick, "seed": SEED}, total=6)
    stages.run("record", "Recording a jointed figure", lambda: _record(out))
    curation = stages.run("curate", "Curating the recordings", lambda: _curate(out))
    alignment = stages.run(
        "alignment", "Training the pose alignment", lambda: _train("alignment", out, [], quick)
    )
    animator = stages.run(
        "animator",
        "Training the animator",
        lambda: _train("animator", out, [f"task.alignment={alignment['model']}"], quick),
    )
    model = Path(animator["model"])
    animation = stages.run("animate", "Animating the portrait", lambda: _animate(out, model, quick))
    shown = stages.run(
        "report",
        "Writing the report",
        lambda: build_report(
            out, model=model, curation=curation, record=animation, stages=stages, quick=quick
        ),
    )
    note(f"      {time.monotonic() - started:.0f} s in this run")
    return {
        "summary": shown["summary"],
        "report": str(out / "report.html"),
        "scores": shown["scores"],
        "kept": curation["kept"],
        "rejected": curation["rejected"],
        "seconds": {name: seconds for name, (_, seconds) in stages.seconds().items()},
    }


def _record(out: Path) -> dict[str, Any]:
    from infra.demo.clips import record

    material = record(out / "material", fps=FPS, num_frames=NUM_FRAMES)
    return {"clips": len(list(material.clips.glob("*.mp4")))}


def _curate(out: Path) -> dict[str, Any]:
    """Curate the clips and see that each bad one is turned away for its own reason."""
    from infra.demo.clips import TAKES
    from pipelines.curation.config import CurationConfig
    from pipelines.curation.pipeline import curate
    from pipelines.curation.progress import progress_bar
    from pipelines.overrides import apply_overrides
    from pipelines.shards import read_records

    # The figure's keypoints are known; the face must be found by the embedded cascade.
    config = apply_overrides(CurationConfig(), ["faces.backend=cascade", "pose.backend=file"])
    shards = out / "shards"
    with progress_bar() as progress:
        curate([str(out / "material" / "clips")], shards, config, progress=progress)
    rows = {}
    for shard in read_records(shards):
        for source in shard.sources:
            reasons = [*source.reasons, *(r for clip in source.clips for r in clip.reasons)]
            rows[Path(source.uris[0]).stem] = {
                "verdict": source.verdict,
                "reasons": list(dict.fromkeys(reasons)),
                "error": source.error,
            }
    wrong = []
    for take in TAKES:
        expected = [REASON[take.rejected_for]] if take.rejected_for else []
        if take.name not in rows or rows[take.name]["reasons"][:1] != expected:
            wrong.append(f"{take.name}: {rows.get(take.name)}, expected {expected or 'kept'}")
    if wrong:
        raise DemoError("curation judged otherwise than it must: " + "; ".join(wrong))
    for name, row in rows.items():
        note(f"      {name:10} {row['verdict']} {', '.join(row['reasons'])}")
    verdicts = [row["verdict"] for row in rows.values()]
    return {
        "rows": rows,
        "kept": verdicts.count("kept"),
        "rejected": verdicts.count("rejected"),
    }


def _train(kind: str, out: Path, settings: list[str], quick: bool) -> dict[str, Any]:
    from pipelines.overrides import apply_overrides, to_dict
    from training.launch import train
    from training.recipes import get_recipe

    config = get_recipe(f"{kind}_demo")
    given = [f"task.shards={out / 'shards'}", *settings, *(QUICK[kind] if quick else [])]
    return to_dict(train(apply_overrides(config, given), out / "runs" / kind))


def _animate(out: Path, model: Path, quick: bool) -> dict[str, Any]:
    from inference.engine import AnimationEngine
    from inference.requests import AnimationRequest
    from infra.progress import stage_bar

    request = AnimationRequest(
        reference=out / "material" / "reference.png",
        driving=out / "material" / "driving.mp4",
        output=out / "animation.mp4",
        seed=SEED,
        steps=QUICK_STEPS if quick else None,
    )
    with stage_bar("animate") as progress:
        return AnimationEngine(model, face="auto", pose="file").run(request, progress=progress)
