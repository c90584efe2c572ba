"""ONNX operators that compute: arithmetic, activations, normalisation, layers and reductions.

They follow the ONNX specification, operator sets 7 to 25, for inference. An operator is entered
with the attributes that its function reads; a file with any other is refused, so nothing in a file
is ignored.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from animator.onnx_node import Node, Table, as_matrix, axes_of, pad_axes, require_elements

LAYERS = Table()


def _plain(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda node, *inputs: function(*inputs)


def _divide(x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


for _kind, _function in {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": _divide,
    "Pow": torch.pow,
    "MatMul": torch.matmul,
    "Neg": torch.neg,
    "Sqrt": torch.sqrt,
    "Exp": torch.exp,
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "HardSwish": F.hardswish,
    "Identity": lambda x: x,
}.items():
    LAYERS.add(_kind)(_plain(_function))


# --- activations ---------------------------------------------------------------------------------


@LAYERS.add("PRelu")
def prelu(node: Node, x: Tensor, slope: Tensor) -> Tensor:
    """x, or slope · x below zero; the slope is one number, one a channel, or broadcast."""
    channels = x.shape[1] if x.ndim > 1 else 0
    per_channel = slope.shape[-x.ndim + 1 :] == (channels, *[1] * (x.ndim - 2))
    # Older exporters write one slope a channel without the axes that broadcast it.
    legacy = x.ndim > 2 and slope.shape == (channels,) and x.shape[-1] != channels
    if slope.numel() == 1 or (slope.numel() == channels and (per_channel or legacy)):
        return F.prelu(x, slope.reshape(-1))
    return torch.where(x < 0, slope * x, x)


@LAYERS.add("LeakyRelu", "alpha")
def leaky_relu(node: Node, x: Tensor) -> Tensor:
    """x, or alpha · x below zero."""
    return F.leaky_relu(x, node.get("alpha", 0.01))


@LAYERS.add("HardSigmoid", "alpha beta")
def hard_sigmoid(node: Node, x: Tensor) -> Tensor:
    """alpha · x + beta, held within 0..1."""
    return (node.get("alpha", 0.2) * x + node.get("beta", 0.5)).clamp(0, 1)


@LAYERS.add("Clip", "min max")
def clip(node: Node, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """x held within limits, which are attributes before operator set 11 and inputs since."""
    lowest = node.get("min", None) if low is None else low
    highest = node.get("max", None) if high is None else high
    if lowest is not None:
        x = torch.clamp(x, min=lowest)
    return x if highest is None else torch.clamp(x, max=highest)


@LAYERS.add("Softmax", "axis")
def softmax(node: Node, x: Tensor) -> Tensor:
    """Along one axis; before operator set 13 along all axes from it on."""
    if node.opset >= 13:
        return x.softmax(node.get("axis", -1))
    return as_matrix(x, node.get("axis", 1)).softmax(1).reshape(x.shape)


# --- normalisation -------------------------------------------------------------------------------


@LAYERS.add("BatchNormalization", "epsilon momentum spatial training_mode")
def batch_normalization(
    node: Node, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    """Per channel, with the statistics of the file."""
    if node.get("training_mode", 0):
        raise ValueError("it is in training mode; export the network for inference")
    return F.batch_norm(x, mean, variance, scale, bias, eps=node.get("epsilon", 1e-5))


@LAYERS.add("InstanceNormalization", "epsilon")
def instance_normalization(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Per image and channel, over the positions."""
    return F.instance_norm(x, weight=scale, bias=bias, eps=node.get("epsilon", 1e-5))


@LAYERS.add("LpNormalization", "axis p")
def lp_normalization(node: Node, x: Tensor) -> Tensor:
    """x over its p-norm along an axis."""
    return F.normalize(x, p=node.get("p", 2), dim=node.get("axis", -1))


@LAYERS.add("Dropout", "ratio seed")
def dropout(node: Node, x: Tensor, *_: Tensor | None) -> Tensor:
    """Nothing is dropped at inference."""
    return x


# --- layers --------------------------------------------------------------------------------------


@LAYERS.add("Gemm", "alpha beta transA transB")
def gemm(node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """alpha · A B + beta · C, A and B transposed where it says so."""
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    product = (a.T if node.get("transA", 0) else a) @ (b.T if node.get("transB", 0) else b)
    product = product if alpha == 1 else alpha * product
    return product if c is None else product + (c if beta == 1 else beta * c)


@dataclass(frozen=True, kw_only=True)
class _Windows:
    """How a kernel moves over the positions of a feature map; one number an axis."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    begin: list[int]  # padding before the first position
    end: list[int]  # padding after the last one
    rest: list[int]  # what the last windows need beyond it, where sizes are rounded up


def _windows(node: Node, sizes: Sequence[int], kernel: Sequence[int]) -> _Windows:
    """The windows of a convolution or pooling over positions of these `sizes`."""
    axes = len(kernel)
    if len(sizes) != axes or len(node.get("kernel_shape", kernel)) != axes:
        raise ValueError(f"a kernel of {list(kernel)} over positions of {list(sizes)}")
    strides = list(node.get("strides", [1] * axes))
    dilations = list(node.get("dilations", [1] * axes))
    span = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    rounding = node.get("auto_pad", "NOTSET")
    if rounding in ("SAME_UPPER", "SAME_LOWER"):
        total = [
            max((math.ceil(n / step) - 1) * step + s - n, 0)
            for n, step, s in zip(sizes, strides, span, strict=True)
        ]
        smaller = [t // 2 for t in total]
        larger = [t - half for t, half in zip(total, smaller, strict=True)]
        begin, end = (smaller, larger) if rounding == "SAME_UPPER" else (larger, smaller)
    elif rounding == "VALID":
        begin, end = [0] * axes, [0] * axes
    else:
        pads = list(node.get("pads", [0] * 2 * axes))
        begin, end = pads[:axes], pads[axes:]
    require_elements([n + b + e for n, b, e in zip(sizes, begin, end, strict=True)])
    rest = [0] * axes
    if node.get("ceil_mode", 0):
        for axis, (n, step, s) in enumerate(zip(sizes, strides, span, strict=True)):
            padded = n + begin[axis] + end[axis]
            last = math.ceil((padded - s) / step) * step
            # A window that would start behind the last position is left out.
            last -= step if last >= n + begin[axis] else 0
            rest[axis] = last + s - padded
    return _Windows(
        kernel=list(kernel), strides=strides, dilations=dilations, begin=begin, end=end, rest=rest
    )


@LAYERS.add("Conv", "auto_pad dilations group kernel_shape pads strides")
def conv(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolution over one, two or three axes."""
    windows = _windows(node, x.shape[2:], weight.shape[2:])
    function: Any = (F.conv1d, F.conv2d, F.conv3d)[len(windows.kernel) - 1]
    padding = windows.begin
    if windows.begin != windows.end:
        x, padding = pad_axes(x, windows.begin, windows.end), 0
    group = node.get("group", 1)
    return function(x, weight, bias, windows.strides, padding, windows.dilations, group)


@LAYERS.add("MaxPool", "auto_pad ceil_mode dilations kernel_shape pads storage_order strides")
def max_pool(node: Node, x: Tensor) -> Tensor:
    """The largest value in each window."""
    windows = _windows(node, x.shape[2:], node.get("kernel_shape", []))
    after = [end + rest for end, rest in zip(windows.end, windows.rest, strict=True)]
    x = pad_axes(x, windows.begin, after, -math.inf)
    function: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(windows.kernel) - 1]
    return function(x, windows.kernel, windows.strides, 0, windows.dilations)


@LAYERS.add(
    "AveragePool", "auto_pad ceil_mode count_include_pad dilations kernel_shape pads strides"
)
def average_pool(node: Node, x: Tensor) -> Tensor:
    """The mean of each window, over the padding too where `count_include_pad` says so."""
    windows = _windows(node, x.shape[2:], node.get("kernel_shape", []))
    function: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(windows.kernel) - 1]
    none = [0] * len(windows.kernel)
    if any(dilation != 1 for dilation in windows.dilations):
        raise ValueError(f"dilations {windows.dilations} are not supported")

    def pooled(values: Tensor, padding: float) -> Tensor:
        values = pad_axes(values, windows.begin, windows.end, padding)
        return function(pad_axes(values, none, windows.rest), windows.kernel, windows.strides)

    if not any(windows.begin + windows.end + windows.rest):
        return pooled(x, 0.0)
    counted = x.new_ones((1, 1, *x.shape[2:]))
    return pooled(x, 0.0) / pooled(counted, float(node.get("count_include_pad", 0)))


@LAYERS.add("GlobalAveragePool")
def global_average_pool(node: Node, x: Tensor) -> Tensor:
    """The mean over all positions, which stay as axes of length 1."""
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


# --- reductions ----------------------------------------------------------------------------------


@LAYERS.add("ReduceMean ReduceSum ReduceL2", "axes keepdims noop_with_empty_axes")
def reduce(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Mean, sum or Euclidean length over axes; over all of them where none is given."""
    over = axes_of(node, axes)
    if not over:
        if node.get("noop_with_empty_axes", 0):
            return x
        over = list(range(x.ndim))
    keep = bool(node.get("keepdims", 1))
    if node.kind == "ReduceL2":
        return torch.linalg.vector_norm(x, dim=over, keepdim=keep)
    return (x.mean if node.kind == "ReduceMean" else x.sum)(dim=over, keepdim=keep)
