"""bench: figures beside a named baseline, measured in one run."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from infra.console import emit, table
from infra.verbs.options import AsJson

Report = Annotated[Path | None, typer.Option(help="Also write the result as JSON.")]


def register(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    bench = typer.Typer(
        no_args_is_help=True, help="Measure speed and memory beside a named baseline."
    )
    bench.command("forward")(forward)
    bench.command("alignment")(alignment)
    app.add_typer(bench, name="bench")


def forward(
    preset: Annotated[str, typer.Option(help="Sizes of the model: tiny or svd_xt.")] = "svd_xt",
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames.")] = None,
    batch: Annotated[int, typer.Option(help="Clips at once.")] = 1,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    repeats: Annotated[int, typer.Option(help="Rounds that are timed.")] = 5,
    compile: Annotated[bool, typer.Option("--compile", help="Through torch.compile.")] = False,
    report: Report = None,
    as_json: AsJson = False,
) -> None:
    """Compare the animator's forward pass with diffusers' plain UNet of the same size.

    Weights are random. Sizes are the preset's own on a GPU, and at most 256 x 256 pixels and 4
    frames on a CPU unless given. Example: animator bench forward --dtype bf16 --report forward.json
    """
    from inference.benchmark import ForwardBench, bench_forward
    from infra.progress import stage_bar

    config = ForwardBench(
        preset=preset,
        height=height,
        width=width,
        frames=frames,
        batch=batch,
        dtype=dtype,
        device=device,
        repeats=repeats,
        compile=compile,
    )
    with stage_bar("bench") as progress:
        progress(0.0, "building")
        result = bench_forward(config, lambda done, total: progress(done / total, "forward"))
    _write(result, report)
    emit(result, as_json=as_json, show=_lines)


def alignment(
    frames: Annotated[int, typer.Option(help="Frames of the clip.")] = 1000,
    repeats: Annotated[int, typer.Option(help="Rounds that are timed.")] = 5,
    block: Annotated[
        str, typer.Option("--alignment", help="Block to time: shipped, or a model folder.")
    ] = "shipped",
    report: Report = None,
    as_json: AsJson = False,
) -> None:
    """Time the alignment of a clip's poses beside the closed form, on one core.

    Example: animator bench alignment --report alignment-speed.json
    """
    from inference.alignment_speed import AlignmentBench, bench_alignment
    from infra.progress import stage_bar

    config = AlignmentBench(frames=frames, repeats=repeats, alignment=block)
    with stage_bar("bench") as progress:
        result = bench_alignment(config, lambda done, total: progress(done / total, "alignment"))
    _write(result, report)
    emit(result, as_json=as_json, show=_alignment_lines)


def _write(result: dict[str, Any], report: Path | None) -> None:
    from pipelines.shards import write_atomic

    if report is not None:
        write_atomic(report, (json.dumps(result, indent=2) + "\n").encode())


def _alignment_lines(result: dict[str, Any]) -> list[str]:
    rows = [
        (
            name,
            f"{row['seconds']:.3f} s",
            f"{row['ms_per_frame']:.3f} ms",
            f"{row['ratio']:.1f} ({row['ratio_low']:.1f} to {row['ratio_high']:.1f})",
        )
        for name, row in result["rows"].items()
    ]
    header = (f"{result['settings']['frames']} frames", "median", "a frame", "of the closed form")
    return [
        f"{result['machine']['processor']}, one thread; {result['alignment']['name']} weights",
        *table(rows, header=header),
    ]


def _lines(result: dict[str, Any]) -> list[str]:
    rows = [
        (
            name,
            f"{row['seconds']:.3f} s",
            f"{row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})",
            f"{row['peak_gb']:.2f} GB",
        )
        for name, row in result["rows"].items()
    ]
    where = result["machine"].get("gpu") or result["machine"]["processor"]
    return [
        f"{where}, sample {tuple(result['sample'])}, {result['settings']['dtype']}, "
        f"{result['weights_gb']:.2f} GB of weights",
        *table(rows, header=("forward", "median", "of the baseline", "peak beyond the weights")),
    ]
