"""bench presets: what each preset costs and how far it is from `quality`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from infra.console import FAILED, emit, table
from infra.verbs.options import Alignment, AsJson, Dtype, Face, Model, Pose, Settings, Size


def presets(
    model: Model,
    reference: Annotated[Path, typer.Option(help="Picture of the person.")],
    driving: Annotated[Path, typer.Option(help="Video with the motion.")],
    names: Annotated[
        str, typer.Option("--presets", help="Which to measure, beside quality.")
    ] = "balanced,fast,low_memory",
    frames: Annotated[int | None, typer.Option(help="Of the clip's beginning; all without.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    repeats: Annotated[int, typer.Option(help="Rounds.")] = 1,
    size: Size = None,
    dtype: Dtype = "auto",
    changes: Settings = None,
    face: Face = "auto",
    pose: Pose = "auto",
    alignment: Alignment = "auto",
    report: Annotated[Path | None, typer.Option(help="Also write the result as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run every preset on the same inputs: seconds, memory, distance from quality, limits.

    Each runs in a process of its own. --set changes the model's own settings, before a preset
    changes them. Exit code 1 if a limit is broken. Example: animator bench presets --model
    runs/animator/model --reference me.jpg --driving dance.mp4 --report presets.json
    """
    from inference.preset_benchmark import PresetBench, bench_presets
    from inference.requests import parse_size
    from infra.progress import stage_bar
    from infra.verbs.bench import write_report

    bench = PresetBench(
        model=model,
        reference=reference,
        driving=driving,
        presets=tuple(name.strip() for name in names.split(",") if name.strip()),
        frames=frames,
        size=None if size is None else parse_size(size, "--size"),
        seed=seed,
        repeats=repeats,
        changes=tuple(changes or ()),
        dtype=dtype,
        face=face,
        pose=pose,
        alignment=alignment,
    )
    with stage_bar("bench") as progress:
        result = bench_presets(bench, progress)
    write_report(result, report)
    emit(result, as_json=as_json, show=_lines)
    if not result["held"]:
        raise typer.Exit(FAILED)


def _lines(result: dict[str, Any]) -> list[str]:
    rows = []
    for name, row in result["rows"].items():
        where = "device_mb" if "device_mb" in row else "host_beyond_mb"
        memory = f"{row[where]:.0f} MB ({row[f'{where}_ratio']:.2f})" if where in row else "-"
        lost = "-" if row["identity_lost"] is None else f"{row['identity_lost']:+.3f}"
        rows.append(
            (
                name,
                f"{row['seconds']:.1f} s",
                f"{row['ratio']:.3f} ({row['cpu_ratio']:.3f})",
                memory,
                f"{row['psnr']:.1f} dB",
                lost,
                "hold" if row["held"] else "; ".join(row["broken"]),
            )
        )
    video, model = result["video"], result["model"]
    where = result["machine"].get("gpu") or result["machine"]["processor"]
    header = ("preset", "time", "ratio (of CPU)", "memory", "PSNR", "identity lost", "limits")
    return [
        f"{where}; {model['name']} of {model['parameters'] / 1e6:.1f} M, {model['steps']} steps, "
        f"guidance {model['guidance'][0]:g} to {model['guidance'][1]:g}; {video['frames']} frames "
        f"of {video['height']}x{video['width']}; faces judged by {result['judge'] or 'nobody'}",
        *table(rows, header=header),
    ]
