"""bench: figures beside a named baseline, measured in one run."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from infra.console import emit, note, table
from infra.verbs.bench_presets import presets
from infra.verbs.options import AsJson, Settings

Report = Annotated[Path | None, typer.Option(help="Also write the result as JSON.")]


def register(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    bench = typer.Typer(
        no_args_is_help=True, help="Measure speed and memory beside a named baseline."
    )
    bench.command("forward")(forward)
    bench.command("alignment")(alignment)
    bench.command("curate")(curate)
    bench.command("hjb")(hjb)
    bench.command("presets")(presets)
    bench.command("train")(train)
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
    write_report(result, report)
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
    from inference.alignment.speed import AlignmentBench, bench_alignment
    from infra.progress import stage_bar

    config = AlignmentBench(frames=frames, repeats=repeats, alignment=block)
    with stage_bar("bench") as progress:
        result = bench_alignment(config, lambda done, total: progress(done / total, "alignment"))
    write_report(result, report)
    emit(result, as_json=as_json, show=_alignment_lines)


def curate(
    videos: Annotated[
        list[Path] | None, typer.Argument(help="Folders or files of videos to measure on.")
    ] = None,
    parts: Annotated[
        str, typer.Option(help="Which to measure: stages, shots, scaling, plan, cluster.")
    ] = "stages,shots,scaling",
    workers: Annotated[int, typer.Option(help="Workers of the run that is measured.")] = 1,
    repeats: Annotated[int, typer.Option(help="Rounds beside the baselines.")] = 3,
    run: Annotated[
        Path | None, typer.Option(help="A finished run, whose stage times `cluster` plays with.")
    ] = None,
    sources: Annotated[int, typer.Option(help="Sources of the run that is played.")] = 1_000_000,
    nodes: Annotated[int, typer.Option(help="Nodes of the played cluster.")] = 100,
    cores: Annotated[int, typer.Option(help="Cores of a node.")] = 16,
    gpus: Annotated[int, typer.Option(help="GPUs of a node.")] = 0,
    gpu_speed: Annotated[float, typer.Option(help="Models on a GPU against one core here.")] = 20,
    losses: Annotated[float, typer.Option(help="Times an hour that a node is lost.")] = 0.0,
    settings: Settings = None,
    report: Report = None,
    as_json: AsJson = False,
) -> None:
    """Measure curation: where its time goes, its cost beside PySceneDetect, and how it grows.

    Example: animator bench curate videos/ --report curate.json
    """
    from infra.bench_curate import CurateBench, measure

    config = CurateBench(
        videos=tuple(videos or ()),
        parts=tuple(part.strip() for part in parts.split(",")),
        workers=workers,
        repeats=repeats,
        run=run,
        sources=sources,
        nodes=nodes,
        cores=cores,
        gpus=gpus,
        gpu_speed=gpu_speed,
        losses=losses,
        settings=tuple(settings or ()),
    )
    result = measure(config, note)
    write_report(result, report)
    emit(result, as_json=as_json, show=_curate_lines)


def train(
    preset: Annotated[str, typer.Option(help="Sizes of the model: tiny or svd_xt.")] = "tiny",
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames.")] = None,
    batch: Annotated[int, typer.Option(help="Clips of a step.")] = 1,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    engines: Annotated[str, typer.Option(help="Of zero2 and ddp.")] = "zero2,ddp",
    recompute: Annotated[float, typer.Option(help="Share of the blocks that recompute.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Steps that are timed.")] = 20,
    baseline: Annotated[
        bool, typer.Option(help="Train a bare copy in turn; without it, peak memory is the loop's.")
    ] = True,
    report: Report = None,
    as_json: AsJson = False,
) -> None:
    """Time a training step by part, and the loop's cost over a bare PyTorch step.

    One worker, random weights and batches. On a GPU at full size. Example: animator bench train
    --preset svd_xt --dtype bf16 --engines zero2 --no-baseline --report train.json
    """
    from infra.progress import stage_bar
    from training.benchmark import TrainBench, bench_train

    config = TrainBench(
        preset=preset,
        height=height,
        width=width,
        frames=frames,
        batch=batch,
        dtype=dtype,
        device=device,
        engines=tuple(name.strip() for name in engines.split(",")),
        recompute=recompute,
        steps=steps,
        baseline=baseline,
    )
    with stage_bar("bench") as progress:
        progress(0.0, "building")
        result = bench_train(config, lambda done, total: progress(done / total, "training"))
    write_report(result, report)
    emit(result, as_json=as_json, show=_train_lines)


def hjb(
    video: Annotated[Path, typer.Argument(help="A clip with a face: what is refined.")],
    reference: Annotated[Path, typer.Argument(help="A picture of the face that it is to have.")],
    frames: Annotated[int, typer.Option(help="Frames.")] = 16,
    height: Annotated[int, typer.Option(help="Pixels.")] = 576,
    width: Annotated[int, typer.Option(help="Pixels.")] = 1024,
    face: Annotated[int, typer.Option(help="Pixels of the face's height.")] = 112,
    iterations: Annotated[int, typer.Option(help="Of Adam.")] = 10,
    chunk: Annotated[int, typer.Option(help="Frames decoded with gradient at a time.")] = 4,
    portion: Annotated[
        int, typer.Option(help="Frames of a pass over whole frames, which crops borrow from.")
    ] = 4,
    published_frames: Annotated[
        int, typer.Option(help="Frames of the published way, which keeps them in one graph.")
    ] = 2,
    rows: Annotated[
        str, typer.Option(help="Of published, exact, crop, crop_alone and key_frames.")
    ] = "published,exact,crop,crop_alone,key_frames",
    repeats: Annotated[int, typer.Option(help="Rounds.")] = 1,
    fit_steps: Annotated[int, typer.Option(help="Steps that fit a small decoder.")] = 400,
    work: Annotated[Path | None, typer.Option(help="Where the fitted decoder is kept.")] = None,
    report: Report = None,
    as_json: AsJson = False,
) -> None:
    """Measure face optimisation: seconds, memory, similarity raised, background changed.

    On a small decoder of the published structure, fitted to the clip for the purpose, and the
    recognition network that ANIMATOR_MODELS holds. One denoising step on the CPU; the published
    size takes long. Example: animator bench hjb talk.mp4 other.jpg --report hjb.json
    """
    from inference.faces.benchmark import HjbBench, bench_hjb
    from infra.progress import stage_bar

    config = HjbBench(
        video=video,
        reference=reference,
        work=work,
        frames=frames,
        height=height,
        width=width,
        face=face,
        iterations=iterations,
        chunk=chunk,
        portion=portion,
        published_frames=published_frames,
        repeats=repeats,
        fit_steps=fit_steps,
        rows=tuple(name.strip() for name in rows.split(",")),
    )
    with stage_bar("bench") as progress:
        result = bench_hjb(config, progress)
    write_report(result, report)
    emit(result, as_json=as_json, show=_hjb_lines)


def _hjb_lines(result: dict[str, Any]) -> list[str]:
    rows = [
        (
            name,
            str(row["frames"]),
            f"{row['seconds']:.1f} s",
            f"{row['ratio']:.3f} ({row['cpu_ratio']:.3f})",
            f"{row['peak_gb']:.2f} GB",
            f"{row['memory_ratio']:.3f}",
            f"{row['similarity_before']:.3f} to {row['similarity_after']:.3f}",
            "-" if row["raise_ratio"] is None else f"{row['raise_ratio']:.1%}",
            f"{row['background_change']:.2f}",
        )
        for name, row in result["rows"].items()
    ]
    header = (
        "face optimisation",
        "frames",
        "median",
        "ratio a frame (of CPU time)",
        "peak",
        "ratio",
        "similarity",
        "raise",
        "background",
    )
    fit = result["decoder"]
    sizes = result["settings"]
    return [
        f"{result['machine']['processor']}, {result['machine']['threads']} threads; "
        f"{sizes['height']}x{sizes['width']}, {sizes['iterations']} iterations; a decoder of "
        f"{fit['channels'][0]} channels fitted in {fit['steps']} steps to {fit['error']:.1f} grey "
        f"levels; {result['recogniser']}; crops of {result['crop_cells']} cells",
        *table(rows, header=header),
    ]


def _train_lines(result: dict[str, Any]) -> list[str]:
    rows = []
    for name, row in result["rows"].items():
        low, high = row.get("overhead_quarters", (0.0, 0.0))
        over = f"{row['overhead']:+.1%} ({low:+.1%} to {high:+.1%})" if "overhead" in row else "-"
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
        parts = [f"{1000 * seconds:.1f}" for seconds in row["parts"].values()]
        times = (f"{1000 * row['seconds']:.1f}", *parts)
        rows.append((name, *times, over, f"{row['tflops']:.3g}", mfu, f"{row['peak_gb']:.2f} GB"))
    where = result["machine"].get("gpu") or result["machine"]["processor"]
    frames, height, width = result["sample"]
    header = ("ms", "step", "data", "forward", "backward", "optimiser", "other")
    return [
        f"{where}, {frames} frames of {height}x{width}, {result['settings']['dtype']}, load "
        f"{result['load'][0]} to {result['load'][-1]}",
        *table(rows, header=(*header, "over a bare step", "TFLOP/s", "MFU", "peak")),
    ]


def _curate_lines(result: dict[str, Any]) -> Iterator[str]:
    for part, found in result.items():
        yield f"{part}:"
        for name, value in found.items():
            if isinstance(value, dict):
                inner = (f"{key} {_short(entry)}" for key, entry in value.items())
                yield f"  {name}: {', '.join(inner)}"
            else:
                yield f"  {name}: {value}"


def _short(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={entry}" for key, entry in value.items())
    return str(value)


def write_report(result: dict[str, Any], report: Path | None) -> None:
    """Write a result as JSON, where that was asked for."""
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
