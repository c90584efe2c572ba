"""ONNX operators that move numbers about: shapes, ranges, borders and kinds of number.

They follow the ONNX specification, operator sets 7 to 25. Sizes are integer tensors on the CPU, so
that reading one never waits for an accelerator.
"""

import torch
from torch import Tensor

from animator.onnx_node import Node, Table, as_matrix, axes_of, integers, pad_axes, require_elements

SHAPES = Table()


@SHAPES.add("Flatten", "axis")
def flatten(node: Node, x: Tensor) -> Tensor:
    """A matrix: the axes before `axis`, and those from it on."""
    return as_matrix(x, node.get("axis", 1))


@SHAPES.add("Reshape", "allowzero")
def reshape(node: Node, x: Tensor, shape: Tensor) -> Tensor:
    """The same numbers in another shape; 0 keeps a size unless `allowzero`, -1 is the rest."""
    sizes = integers(shape)
    if not node.get("allowzero", 0):
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


@SHAPES.add("Transpose", "perm")
def transpose(node: Node, x: Tensor) -> Tensor:
    """The axes in another order; reversed where none is given."""
    return x.permute(node.get("perm", list(reversed(range(x.ndim)))))


@SHAPES.add("Squeeze", "axes")
def squeeze(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Without axes of length 1: the given ones, or all."""
    gone = axes_of(node, axes) or [axis for axis, size in enumerate(x.shape) if size == 1]
    if any(x.shape[axis] != 1 for axis in gone):
        raise ValueError(f"axes {gone} of {list(x.shape)} are not all of length 1")
    return x.squeeze(gone)


@SHAPES.add("Unsqueeze", "axes")
def unsqueeze(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """With new axes of length 1, counted in the result."""
    new = axes_of(node, axes)
    for axis in sorted(axis % (x.ndim + len(new)) for axis in new):
        x = x.unsqueeze(axis)
    return x


@SHAPES.add("Concat", "axis")
def concat(node: Node, *parts: Tensor) -> Tensor:
    """One after another along an axis."""
    return torch.cat(parts, dim=node.get("axis", 1))


@SHAPES.add("Slice", "starts ends axes")
def slice_axes(
    node: Node,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """Ranges of axes; their bounds are attributes before operator set 10 and inputs since."""
    first = node.get("starts", []) if starts is None else integers(starts)
    last = node.get("ends", []) if ends is None else integers(ends)
    over = node.get("axes", range(len(first))) if axes is None else integers(axes)
    stride = [1] * len(first) if steps is None else integers(steps)
    for axis, start, end, step in zip(over, first, last, stride, strict=True):
        kept = range(x.shape[axis])[slice(start, end, step)]
        if step == 1:
            x = x.narrow(axis, kept.start, len(kept))
        else:
            count = torch.arange(len(kept), device=x.device)
            x = x.index_select(axis, kept.start + kept.step * count)
    return x


@SHAPES.add("Gather", "axis")
def gather(node: Node, x: Tensor, index: Tensor) -> Tensor:
    """Entries of an axis; the axis becomes those of the index."""
    axis = node.get("axis", 0) % x.ndim
    index = torch.where(index < 0, index + x.shape[axis], index)
    picked = x.index_select(axis, index.reshape(-1).to(x.device))
    return picked.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


@SHAPES.add("Pad", "mode pads value")
def pad(
    node: Node,
    x: Tensor,
    pads: Tensor | None = None,
    value: Tensor | None = None,
    axes: Tensor | None = None,
) -> Tensor:
    """Borders of a constant or of the tensor itself; amounts are inputs since operator set 11."""
    amounts = list(node.get("pads", [])) if pads is None else integers(pads)
    over = list(range(x.ndim)) if axes is None else [axis % x.ndim for axis in integers(axes)]
    begin, end = [0] * x.ndim, [0] * x.ndim
    for axis, low, high in zip(over, amounts[: len(over)], amounts[len(over) :], strict=True):
        begin[axis], end[axis] = low, high
    require_elements([n + b + e for n, b, e in zip(x.shape, begin, end, strict=True)])
    mode = node.get("mode", "constant")
    if mode == "constant":
        return pad_axes(x, begin, end, node.get("value", 0.0) if value is None else value.item())
    for axis, (low, high) in enumerate(zip(begin, end, strict=True)):
        if low or high:
            positions = torch.arange(-low, x.shape[axis] + high, device=x.device)
            x = x.index_select(axis, _inside(positions, x.shape[axis], mode))
    return x


def _inside(positions: Tensor, size: int, mode: str) -> Tensor:
    """Where along an axis the numbers of its border come from."""
    if mode == "edge":
        return positions.clamp(0, size - 1)
    if mode == "wrap":
        return positions % size
    if mode == "reflect":
        period = max(2 * (size - 1), 1)
        return torch.minimum(positions % period, -positions % period)
    raise ValueError(f"the mode {mode!r} is not supported")


@SHAPES.add("Shape", "start end")
def shape(node: Node, x: Tensor) -> Tensor:
    """The sizes of a tensor, as integers on the CPU."""
    sizes = list(x.shape)[node.get("start", 0) : node.get("end", None)]
    return torch.tensor(sizes, dtype=torch.long)


# onnx.TensorProto's codes: float, float16, double, bfloat16; uint8 to int64, uint32, uint64; bool.
_FLOATS, _INTEGERS, _BOOLEAN = {1, 10, 11, 16}, {2, 3, 4, 5, 6, 7, 12, 13}, 9


@SHAPES.add("Cast", "to saturate")
def cast(node: Node, x: Tensor) -> Tensor:
    """To another kind of number. A network here has one floating type: its module's."""
    kind = node.get("to", 0)
    if kind in _FLOATS:
        return x if x.is_floating_point() else x.float()
    if kind in _INTEGERS:
        return x.long()
    if kind == _BOOLEAN:
        return x.bool()
    raise ValueError(f"numbers of the ONNX type {kind} are not supported")


@SHAPES.add("ConstantOfShape", "value")
def constant_of_shape(node: Node, sizes: Tensor) -> Tensor:
    """One number, repeated; 0 where none is given."""
    value = node.get("value", torch.zeros(1))
    require_elements(integers(sizes))
    return torch.full(integers(sizes), value.item(), dtype=value.dtype)
