"""Options that several verbs share."""

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be given often."),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="quality, balanced, fast or low_memory; the model's own settings without. --set "
        "changes what it sets."
    ),
]
Face = Annotated[
    str, typer.Option(help="Face backend: auto, cascade, insightface or insightface:NAME.")
]
Pose = Annotated[str, typer.Option(help="Pose backend: auto, file, onnx or dwpose.")]
OutFolder = Annotated[Path, typer.Option("--out", help="Folder for the results.")]
Model = Annotated[Path, typer.Option("--model", help="Folder of a trained model.")]
Alignment = Annotated[
    str,
    typer.Option(
        help="Alignment of poses: auto (the model's own or the shipped), shipped, closed-form, or "
        "a model folder."
    ),
]
Align = Annotated[
    bool, typer.Option("--align/--no-align", help="Move the motion to where the person is.")
]
PerFrame = Annotated[
    bool, typer.Option("--per-frame", help="Align each frame by itself, not the whole clip.")
]
MaxScale = Annotated[float | None, typer.Option(help="Scale the motion at most by this factor.")]
MaxRotation = Annotated[
    float | None, typer.Option(help="Turn the motion at most by these degrees.")
]
Size = Annotated[str | None, typer.Option(help="Height and width to work at, as 1024x576.")]
Dtype = Annotated[str, typer.Option(help="Type of weights: auto, fp32, bf16 or fp16.")]
Framing = Annotated[str, typer.Option(help="Fit the picture by pad or by crop.")]
