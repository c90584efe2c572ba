"""The alignment block as an ONNX file, written only where it computes what torch does.

Shapes: B batch (any), N joints. Inputs are those of `AlignmentBlock.forward`; outputs are its
transform's scale, cos, sin `(B,)` and shift `(B, 2)`, votes `(B, 3)` and error `(B,)`.
"""

import copy
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from animator.alignment import AlignmentBlock
from animator.similarity import apply, identity
from animator.tensor_files import WeightsError, write_atomically

INPUTS = ("reference", "driven", "weight", "frame")
OUTPUTS = ("scale", "cos", "sin", "shift", "votes", "error")
OPSET = 20
TOLERANCE = 1e-5  # of an output of size 1, or of its own size where that is larger
_MEANING = "x -> scale * R x + shift, with R the rotation of (cos, sin), aligns driven to reference"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and how far it is from torch."""

    path: Path
    opset: int
    difference: float  # the largest, as `TOLERANCE` counts it
    poses: int  # pairs of poses it was compared on


def export_alignment(
    block: AlignmentBlock, path: Path, about: Mapping[str, str | None] | None = None
) -> Exported:
    """Write the block as ONNX, compared in ONNX Runtime with torch before it gets its name.

    Args:
        path: of the file; another one of that name stays where this one is refused.
        about: goes into the file's metadata: name, licence and digest of the weights.

    Raises:
        WeightsError: for a file that does not give torch's numbers.
    """
    flat = _Flat(copy.deepcopy(block)).eval().float().cpu()
    model = _model(flat)
    notes = {
        "inputs": json.dumps(INPUTS),
        "outputs": json.dumps(OUTPUTS),
        "opset": str(OPSET),
        "transform": _MEANING,
        **{key: value for key, value in (about or {}).items() if value is not None},
    }
    for key, value in notes.items():
        model.metadata_props.add(key=key, value=value)
    measured: list[tuple[float, int]] = []

    def write(staged: Path) -> None:
        staged.write_bytes(model.SerializeToString(deterministic=True))
        measured.append(_compare(flat, staged))

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)
    ((difference, poses),) = measured
    return Exported(path=path, opset=OPSET, difference=difference, poses=poses)


class _Flat(nn.Module):
    """The block with a tuple of tensors as its output."""

    def __init__(self, block: AlignmentBlock):
        super().__init__()
        self.block = block

    def forward(
        self, reference: Tensor, driven: Tensor, weight: Tensor, frame: Tensor
    ) -> tuple[Tensor, ...]:
        transform, votes, error = self.block(reference, driven, weight, frame)
        return *transform, votes, error


def _model(flat: _Flat) -> Any:
    """The ONNX model, free of names of this machine."""
    example = _poses(flat, 3, torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} for _ in INPUTS)
    with torch.no_grad(), _quiet():
        program = torch.export.export(flat, example, dynamic_shapes=shapes)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=INPUTS,
            output_names=OUTPUTS,
        )
    if exported is None:
        raise WeightsError("torch gave no ONNX model.")
    model = exported.model_proto
    # Nodes say where in whose source they come from; shapes inside are found again by readers.
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    model.graph.ClearField("value_info")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on what it does and on packages that are not here."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _compare(flat: _Flat, path: Path) -> tuple[float, int]:
    """The largest difference between ONNX Runtime and torch, and on how many pairs of poses.

    Raises:
        WeightsError: for one larger than the tolerance, or where only one of them is finite.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        path.read_bytes(), options, providers=["CPUExecutionProvider"]
    )
    worst, count = 0.0, 0
    for inputs in _trials(flat):
        with torch.no_grad():
            expected = flat(*inputs)
        feed = {name: part.numpy() for name, part in zip(INPUTS, inputs, strict=True)}
        given = session.run(list(OUTPUTS), feed)
        count += len(inputs[0])
        for name, ours, truth in zip(OUTPUTS, given, expected, strict=True):
            off = _difference(np.asarray(ours), truth.numpy())
            if not off <= TOLERANCE:
                raise WeightsError(
                    f"The ONNX file's {name} is off by {off:.2g} for {len(inputs[0])} poses, "
                    f"expected at most {TOLERANCE:g}; nothing was written."
                )
            worst = max(worst, off)
    return worst, count


def _difference(given: np.ndarray, expected: np.ndarray) -> float:
    """The largest, relative to the expected size where that is above 1; NaN for another shape."""
    if given.shape != expected.shape:
        return float("nan")
    return float((np.abs(given - expected) / np.maximum(1, np.abs(expected))).max())


def _trials(flat: _Flat) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Ordinary pairs of poses, alone and many at once, and then pairs of every degenerate kind."""
    generator = torch.Generator().manual_seed(1)
    for batch in (1, 7, 64):
        yield _poses(flat, batch, generator)
    degenerate = _poses(flat, 7, generator)
    reference, driven, weight, _frame = degenerate
    weight[0] = 0  # nothing in common
    weight[1], weight[1, 2:] = 1, 0  # two joints in common
    reference[2] = torch.nan
    driven[3, ::2] = torch.nan
    weight[4, 5] = torch.inf
    # All in one point, and its mean exact: the block magnifies a person that small a thousandfold,
    # and with it how torch and ONNX Runtime each round a sum.
    weight[5:] = 1
    driven[5] = 0.25
    reference[6], driven[6] = 0.25, -0.5
    yield degenerate
    for i in range(len(reference)):
        one = (part[i : i + 1] for part in degenerate)
        yield next(one), next(one), next(one), next(one)


def _poses(
    flat: _Flat, batch: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random pairs: the driven pose is the reference misaligned, with other limbs."""
    joints = flat.block.config.num_keypoints
    reference = 0.2 * torch.randn(batch, joints, 2, generator=generator)
    same = identity((batch,), reference)
    angle = 0.5 * torch.randn(batch, generator=generator)
    misaligned = same._replace(
        scale=torch.exp(0.4 * torch.randn(batch, generator=generator)),
        cos=angle.cos(),
        sin=angle.sin(),
        shift=0.2 * torch.randn(batch, 2, generator=generator),
    )
    moved = reference + 0.05 * torch.randn(batch, joints, 2, generator=generator)
    weight = torch.rand(batch, joints, generator=generator)
    weight = weight * (torch.rand(batch, joints, generator=generator) > 0.2)
    frame = 0.5 + 0.5 * torch.rand(batch, 2, generator=generator)
    return reference, apply(misaligned, moved), weight, frame
