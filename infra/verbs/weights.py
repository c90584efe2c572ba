"""weights: published checkpoints made into model folders, and a model's part into ONNX."""

from pathlib import Path
from typing import Annotated, Any

import typer

from infra.console import emit, note
from infra.verbs.options import AsJson

Out = Annotated[Path, typer.Option("--out", help="Model folder to write.")]
Precision = Annotated[
    str, typer.Option("--dtype", help="Type of the written weights: keep, fp32, bf16 or fp16.")
]
DTYPES = ("keep", "fp32", "bf16", "fp16")


def register(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    weights = typer.Typer(
        no_args_is_help=True, help="Published weights made into model folders; export to ONNX."
    )
    weights.command("import-v1")(import_v1)
    weights.command("from-svd")(from_svd)
    weights.command("export-alignment")(export_alignment)
    app.add_typer(weights, name="weights")


def import_v1(
    out: Out,
    folder: Annotated[
        Path | None,
        typer.Argument(help="Folder with unet.pth and the other two; the pulled one by default."),
    ] = None,
    svd: Annotated[
        Path | None,
        typer.Option(help="Folder of Stable Video Diffusion, for its frozen encoders."),
    ] = None,
    channel_order: Annotated[
        str, typer.Option(help="Channels as the face network saw them in training: bgr or rgb.")
    ] = "bgr",
    dtype: Precision = "keep",
    as_json: AsJson = False,
) -> None:
    """Turn the published v1 checkpoints into a model folder.

    The files may hold tensors only; every one of them is accounted for.
    Example: animator weights import-v1 StableAnimator/Animation --svd svd-xt --out models/v1
    """
    from animator import licences
    from animator.published import (
        V1_GUIDANCE,
        V1_SAMPLING,
        V1_WINDOWS,
        animator_from_v1,
        v1_files,
    )
    from animator.weights import encoder_files

    folder = folder or _pulled("stableanimator-v1")
    if folder is None:
        raise ValueError(
            "No folder of v1 checkpoints was given, and none was pulled: give one, or run "
            "`animator models pull stableanimator-v1`."
        )
    _check_target(out)
    if channel_order not in ("rgb", "bgr"):
        raise ValueError(f"--channel-order is {channel_order!r}, expected rgb or bgr.")
    svd = svd or _pulled("svd-xt")
    if svd is not None:
        encoder_files(svd)  # named before the checkpoints are read
    model = animator_from_v1(folder, channel_order=channel_order, dtype=_dtype(dtype))
    about = {
        "sampling": V1_SAMPLING,
        "guidance": V1_GUIDANCE,
        "windows": V1_WINDOWS,
        "licence": licences.STABLEANIMATOR_V1,
        "source": {"name": "StableAnimator v1", "files": _digests(v1_files(folder))},
    }
    emit(_write(model, out, svd, about), as_json=as_json, show=lambda r: _lines(r, out))


def from_svd(
    folder: Annotated[Path, typer.Argument(help="Folder of Stable Video Diffusion.")],
    out: Out,
    variant: Annotated[
        str | None, typer.Option(help="fp16 reads the half-precision files where both are there.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the parts that start from scratch.")] = 0,
    dtype: Precision = "keep",
    as_json: AsJson = False,
) -> None:
    """Make an untrained animator that starts from Stable Video Diffusion.

    Training starts from it with --set task.start=OUT. Example: animator weights from-svd svd-xt
    --out models/start
    """
    import torch

    from animator import licences
    from animator.stable_video import animator_from_svd, diffusers_files
    from animator.weights import encoder_files

    _check_target(out)
    encoders = folder if (folder / "unet").is_dir() else folder.parent
    if folder.is_dir():
        encoder_files(encoders)
    torch.manual_seed(seed)
    model = animator_from_svd(folder, variant=variant, dtype=_dtype(dtype))
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    about = {
        "licence": licences.STABILITY,
        "trained": False,
        "source": {
            "name": "Stable Video Diffusion",
            "files": _digests(diffusers_files(unet, variant)),
        },
    }
    emit(_write(model, out, encoders, about), as_json=as_json, show=lambda r: _lines(r, out))


def export_alignment(
    out: Annotated[Path, typer.Option("--out", help="ONNX file to write.")],
    model: Annotated[
        str, typer.Option(help="Model folder with an alignment block, or shipped.")
    ] = "shipped",
    as_json: AsJson = False,
) -> None:
    """Write the pose alignment block as ONNX, for other programs.

    ONNX Runtime must give torch's numbers on ordinary and degenerate poses, or nothing is written.
    Example: animator weights export-alignment --model shipped --out alignment.onnx
    """
    if out.suffix != ".onnx" or out.is_dir():
        raise ValueError(f"--out is {out}, expected a file named NAME.onnx.")
    from animator import onnx_export
    from animator.alignment_weights import AUTO, CLOSED_FORM, SHIPPED, open_alignment

    block, about = (None, {}) if model in (AUTO, CLOSED_FORM) else open_alignment(model)
    if block is None:
        raise ValueError(
            f"--model is {model!r}, but only weights are exported: expected {SHIPPED} or a model "
            "folder."
        )
    exported = onnx_export.export_alignment(block, out, about)
    result = {
        "file": str(exported.path),
        "weights": about,
        "opset": exported.opset,
        "inputs": onnx_export.INPUTS,
        "outputs": onnx_export.OUTPUTS,
        "largest_difference": exported.difference,
        "compared_on": exported.poses,
    }
    emit(result, as_json=as_json, show=_export_lines)


def _export_lines(result: dict[str, Any]) -> list[str]:
    return [
        f"{result['file']}: opset {result['opset']}, {', '.join(result['inputs'])} to "
        f"{', '.join(result['outputs'])}",
        f"ONNX Runtime against torch on {result['compared_on']} pairs of poses: largest difference "
        f"{result['largest_difference']:.1e}",
        f"Weights: {result['weights']['name']}, SHA-256 {result['weights']['sha256']}",
        f"Licence: {result['weights']['licence']}",
    ]


def _check_target(out: Path) -> None:
    for name in ("config.json", "vae", "image_encoder", "unet"):
        if (out / name).exists():
            raise ValueError(
                f"{out} already holds {name}: give another folder, or remove this one first."
            )


def _dtype(name: str) -> Any:
    import torch

    types = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in types:
        raise ValueError(f"--dtype is {name!r}, expected one of {', '.join(DTYPES)}.")
    return types[name]


def _pulled(name: str) -> Path | None:
    """The folder of a model that `models pull` fetched or ANIMATOR_MODELS holds."""
    from pipelines.models import locate_folder

    return locate_folder(name)


def _digests(files: list[Path]) -> dict[str, str]:
    from pipelines.shards import sha256_file

    return {path.name: sha256_file(path) for path in files}


def _write(model: Any, out: Path, svd: Path | None, about: dict[str, Any]) -> dict[str, Any]:
    import dataclasses

    from animator.weights import add_encoders

    out.mkdir(parents=True, exist_ok=True)
    copied = [] if svd is None else add_encoders(out, svd)
    model.save_pretrained(out, about=about)
    if svd is None:
        note(
            f"{out} has no vae/ and image_encoder/ yet, which animating needs: copy those two "
            "folders of Stable Video Diffusion into it (`animator models pull svd-xt` fetches it)."
        )
    return {
        "model": str(out),
        "parameters": sum(p.numel() for p in model.parameters()),
        "sizes": dataclasses.asdict(model.config),
        "encoders": copied,
        **about,
    }


def _lines(result: dict[str, Any], out: Path) -> list[str]:
    sizes = result["sizes"]
    return [
        f"{out}: {result['parameters']:,} parameters, {sizes['height']} x {sizes['width']}, "
        f"windows of {sizes['num_frames']} frames, face channels {sizes['face_channel_order']}",
        f"Licence: {result['licence']}",
    ]
