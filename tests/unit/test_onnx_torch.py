"""ONNX files as torch modules: the numbers of ONNX Runtime, gradients, and what is refused."""

import copy
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx_sketch import Sketch, runtime

from animator.onnx_file import MAX_BYTES, OnnxError
from animator.onnx_torch import OnnxNetwork

SAMPLE = (3, 11, 9)


def samples(count: int = 3, shape: tuple[int, ...] = SAMPLE) -> torch.Tensor:
    return torch.rand((count, *shape), generator=torch.Generator().manual_seed(1)) * 2 - 1


# --- networks, each from the input's name to the output's ----------------------------------------


def old_residual(s: Sketch) -> str:
    """The layout of an iResNet as mxnet's exporter writes it."""
    x = s.op("Sub", "data", s.weight([127.5]), name="_minusscalar0")
    x = s.op("Mul", x, s.weight([0.0078125]), name="_mulscalar0")
    x = s.conv(x, (3, 8), pads=[1] * 4, kernel_shape=[3, 3])
    x = s.batch_norm(x, 8, spatial=1, momentum=0.9, epsilon=2e-5)
    x = s.op("PRelu", x, s.normal(8, 1, 1))
    y = s.batch_norm(x, 8, spatial=1)
    y = s.op("PRelu", s.conv(y, (8, 8), pads=[1] * 4), s.weight(s.rng.random((1, 8, 1, 1))))
    y = s.batch_norm(s.conv(y, (8, 8), pads=[1] * 4, strides=[2, 2]), 8)
    x = s.op("Add", y, s.conv(x, (8, 8), 1, strides=[2, 2]))
    x = s.op("Dropout", s.batch_norm(x, 8), ratio=0.4)
    x = s.op("Gemm", s.op("Flatten", x), s.normal(5, 240, scale=0.1), s.normal(5), transB=1)
    return s.batch_norm(x, 5)


def mobile(s: Sketch) -> str:
    """Depthwise convolutions, squeeze and excitation, hard activations."""
    x = s.op("HardSwish", s.conv("data", (3, 6), auto_pad="SAME_UPPER", strides=[2, 2]))
    x = s.conv(x, (6, 6), auto_pad="SAME_LOWER", strides=[2, 2], group=6)
    gate = s.op("Relu", s.conv(s.op("GlobalAveragePool", x), (6, 4), 1))
    gate = s.op("HardSigmoid", s.conv(gate, (4, 6), 1), alpha=0.3, beta=0.4)
    x = s.op("Mul", x, gate)
    x = s.op("Clip", x, s.weight(-0.2), s.weight(0.5))
    x = s.op("Clip", s.conv(x, (6, 6), 1, auto_pad="VALID"), "", s.weight(1.5))
    return s.op("Reshape", x, s.sizes(0, -1))


def convolutions(s: Sketch) -> str:
    x = s.conv("data", (3, 4), pads=[0, 2, 3, 1], strides=[1, 2])
    x = s.conv(x, (4, 4), dilations=[2, 1], pads=[2, 1, 2, 1], group=2)
    x = s.op("LeakyRelu", x, alpha=0.2)
    x = s.op("Reshape", x, s.sizes(0, 4, -1))
    x = s.op("Conv", x, s.normal(5, 4, 4), pads=[1, 2], strides=[3])
    return s.op("Flatten", s.op("Tanh", x))


def pooling(s: Sketch) -> str:
    window: dict[str, Any] = {"kernel_shape": [3, 2], "strides": [2, 2]}
    parts = [
        s.op("AveragePool", "data", **window, pads=[1, 0, 1, 1]),
        s.op("AveragePool", "data", **window, pads=[1, 0, 1, 1], count_include_pad=1),
        s.op("AveragePool", "data", **window, ceil_mode=1),
        s.op("AveragePool", "data", **window, auto_pad="SAME_LOWER"),
        s.op("MaxPool", "data", **window, pads=[0, 1, 1, 1]),
        s.op("MaxPool", "data", **window, ceil_mode=1),
        s.op("MaxPool", "data", **window, dilations=[2, 3]),
        s.op("GlobalAveragePool", "data"),
    ]
    return s.op("Concat", *[s.op("Flatten", part) for part in parts], axis=1)


def dynamic_shapes(s: Sketch) -> str:
    """What a tracing exporter makes of `x.view(x.size(0), -1)` and `x / x.size(1)`."""
    sizes = s.op("Shape", "data")
    batch = s.op("Gather", sizes, s.weight(0, np.int64), axis=0)
    rest = s.op("Slice", sizes, s.sizes(2), s.sizes(2**62), s.sizes(0))
    rest = s.op("Mul", s.op("Gather", rest, s.sizes(0)), s.op("Gather", rest, s.sizes(-1)))
    channels = s.op("Div", s.op("Add", s.op("Gather", sizes, s.sizes(1)), s.sizes(4)), s.sizes(2))
    flat = s.op(
        "Concat", s.op("Unsqueeze", batch, axes=[0]), channels, s.op("Identity", rest), axis=0
    )
    x = s.op("Reshape", s.op("Reshape", "data", s.sizes(0, -1)), s.sizes(0, 3, -1))
    x = s.op("Div", x, s.op("Cast", rest, to=TensorProto.FLOAT))
    x = s.op("Pad", x, s.sizes(0, 0, 0, 0, 0, 0), s.weight(0.0), mode="constant")
    zeros = s.op(
        "ConstantOfShape", flat, value=helper.make_tensor("v", TensorProto.FLOAT, [1], [0.5])
    )
    return s.op("Flatten", s.op("Concat", x, zeros, axis=1))


def axes_as_attributes(s: Sketch) -> str:
    x = s.op("Transpose", "data", perm=[0, 2, 3, 1])
    x = s.op("Unsqueeze", s.op("ReduceMean", x, axes=[1], keepdims=0), axes=[1, 4])
    x = s.op("Squeeze", s.op("ReduceSum", x, axes=[2]), axes=[1])
    x = s.op("Transpose", x, perm=[0, 2, 1, 3])
    x = s.op("Add", x, s.op("ReduceL2", "data", axes=[-1, -2]))
    x = s.op("Squeeze", x, axes=[2, 3])
    x = s.op("Clip", s.op("Softmax", x), min=0.1)
    y = s.op("Slice", "data", starts=[1, -4], ends=[3, 100], axes=[1, 3])
    y = s.op("Pad", y, pads=[0, 0, 0, 2, 0, 0, 1, 0], mode="reflect")
    y = s.op("Softmax", s.op("Clip", y, max=0.5), axis=2)
    return s.op("Concat", x, s.op("Flatten", y), axis=1)


def axes_as_inputs(s: Sketch) -> str:
    x = s.op("ReduceMean", "data", s.sizes(2), keepdims=0)
    x = s.op("Unsqueeze", x, s.sizes(-1, 1))
    x = s.op("Squeeze", s.op("ReduceL2", x, s.sizes(3)), s.sizes(1, -1))
    x = s.op("Softmax", s.op("ReduceSum", x, s.sizes(2), keepdims=0))
    y = s.op("Slice", "data", s.sizes(-1, 8), s.sizes(-100, 1), s.sizes(1, 2), s.sizes(-1, -3))
    y = s.op("Pad", y, s.sizes(1, 2), "", s.sizes(-1), mode="edge")
    y = s.op("LpNormalization", s.op("Transpose", y), axis=0, p=2)
    y = s.op("Flatten", s.op("Transpose", y))
    y = s.op("Cast", s.op("Identity", y), to=TensorProto.DOUBLE)
    return s.op("Concat", x, s.op("Cast", y, to=TensorProto.FLOAT), axis=-1)


def arithmetic(s: Sketch) -> str:
    x = s.op("InstanceNormalization", "data", s.normal(3), s.normal(3), epsilon=1e-3)
    x = s.op("Exp", s.op("Neg", s.op("Pow", x, s.weight(2.0))))
    x = s.op("Sub", s.op("Sqrt", x), s.op("Sigmoid", "data"))
    x = s.op("Div", s.op("PRelu", x, s.weight([0.3])), s.normal(11, 1))
    x = s.op("MatMul", x, s.normal(9, 2))
    x = s.op("PRelu", s.op("Flatten", x), s.normal(66))
    transposed = s.op("Transpose", x)
    return s.op("Gemm", transposed, s.normal(66, 4), s.normal(1, 4), alpha=0.5, beta=2.0, transA=1)


NETWORKS = [
    (old_residual, 8, True),
    (pooling, 10, False),
    (convolutions, 11, False),
    (dynamic_shapes, 11, False),
    (axes_as_attributes, 9, True),
    (mobile, 14, False),
    (arithmetic, 15, False),
    (axes_as_inputs, 18, False),
]


@pytest.mark.parametrize(("draw", "opset", "listed"), NETWORKS)
def test_gives_the_numbers_of_onnx_runtime(
    draw: Callable[[Sketch], str], opset: int, listed: bool, tmp_path: Path
):
    sketch = Sketch(opset=opset)
    path = sketch.save(tmp_path / "net.onnx", draw(sketch), SAMPLE, listed=listed)
    network = OnnxNetwork.from_file(path, SAMPLE)
    expected = runtime(path, samples())
    assert network.dim == expected.shape[1]
    torch.testing.assert_close(network(samples()), expected, rtol=1e-4, atol=1e-4)


def test_constants_may_be_nodes(tmp_path: Path):
    s = Sketch(opset=13)
    half = s.op("Constant", value_float=0.5)
    whole = s.op("Constant", value_ints=[0, -1])
    tensor = s.op("Constant", value=helper.make_tensor("t", TensorProto.FLOAT16, [1], [1.5]))
    x = s.op("Mul", "data", half)
    x = s.op("Add", x, s.op("Cast", tensor, to=TensorProto.FLOAT))
    path = s.save(tmp_path / "net.onnx", s.op("Reshape", x, whole), SAMPLE)
    network = OnnxNetwork.from_file(path, SAMPLE)
    torch.testing.assert_close(network(samples()), runtime(path, samples()))


def test_slopes_without_axes_are_one_a_channel(tmp_path: Path):
    s = Sketch(opset=8)
    slope = np.array([0.1, 0.2, 0.3], np.float32)
    path = s.save(
        tmp_path / "a.onnx", s.op("Flatten", s.op("PRelu", "data", s.weight(slope))), SAMPLE
    )
    network = OnnxNetwork.from_file(path, SAMPLE)
    expected = torch.nn.functional.prelu(samples(), torch.from_numpy(slope)).flatten(1)
    torch.testing.assert_close(network(samples()), expected)


# --- batches -------------------------------------------------------------------------------------


def test_a_file_exported_for_one_input_takes_batches(tmp_path: Path):
    s = Sketch(opset=11)
    x = s.op("Reshape", s.conv("data", (3, 4), strides=[2, 2]), s.sizes(1, 80))
    x = s.op("Gemm", x, s.normal(80, 6), s.normal(6))
    path = s.save(tmp_path / "net.onnx", s.op("PRelu", x, s.normal(6)), SAMPLE, batch=1)
    network = OnnxNetwork.from_file(path, SAMPLE)
    batch = samples(4).requires_grad_()
    expected = torch.cat([runtime(path, one[None]) for one in batch.detach()])
    torch.testing.assert_close(network(batch), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network(batch[:1]), expected[:1], rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(network(batch).square().sum(), batch)
    (single,) = torch.autograd.grad(network(batch[2:3]).square().sum(), batch)
    torch.testing.assert_close(gradient[2], single[2], rtol=1e-4, atol=1e-4)


# --- gradients, types, devices -------------------------------------------------------------------


def residual(tmp_path: Path) -> OnnxNetwork:
    s = Sketch(opset=8)
    return OnnxNetwork.from_file(s.save(tmp_path / "net.onnx", old_residual(s), SAMPLE), SAMPLE)


def test_gradients_are_those_of_finite_differences(tmp_path: Path):
    network = residual(tmp_path).double()
    x = (samples(2).double() * 127.5 + 127.5).requires_grad_()
    assert torch.autograd.gradcheck(network, (x,), eps=1e-4, fast_mode=True)


def test_is_frozen_and_the_same_in_every_mode(tmp_path: Path):
    network = residual(tmp_path)
    expected = network.eval()(samples())
    torch.testing.assert_close(network.train()(samples()), expected)
    assert not list(network.parameters())
    assert not network.state_dict()
    torch.testing.assert_close(copy.deepcopy(network)(samples()), expected)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("draw", [old_residual, dynamic_shapes])
def test_computes_in_the_type_it_is_moved_to(
    kind: torch.dtype, draw: Callable[[Sketch], str], tmp_path: Path
):
    s = Sketch(opset=11 if draw is dynamic_shapes else 8)
    path = s.save(tmp_path / "net.onnx", draw(s), SAMPLE)
    network = OnnxNetwork.from_file(path, SAMPLE)
    expected = network(samples())
    result = network.to(kind)(samples())
    assert result.dtype == kind == network.dtype
    assert torch.nn.functional.cosine_similarity(result.float(), expected).min() > 0.999


# --- what is refused -----------------------------------------------------------------------------


def refused(path: Path, match: str, sample: tuple[int, ...] = SAMPLE) -> str:
    with pytest.raises(OnnxError, match=match) as caught:
        OnnxNetwork.from_file(path, sample)
    assert path.name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "holds no network"),
        (b"not a network, but a text of some length\n" * 99, "is no ONNX file"),
        (bytes(range(256)) * 9, "is no ONNX file"),
    ],
)
def test_garbage_is_refused(content: bytes, match: str, tmp_path: Path):
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    refused(path, match)


def test_missing_and_endless_files_are_refused(tmp_path: Path):
    refused(tmp_path / "absent.onnx", "no such file")
    path = tmp_path / "net.onnx"
    path.touch()
    os.truncate(path, MAX_BYTES + 1)
    refused(path, "may have")


def test_truncated_file_is_refused(tmp_path: Path):
    s = Sketch(opset=8)
    path = s.save(tmp_path / "net.onnx", old_residual(s), SAMPLE)
    whole = path.read_bytes()
    for share in (0.2, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        refused(path, "fetch")


@pytest.mark.parametrize("opset", [6, 99])
def test_unknown_operator_sets_are_refused(opset: int, tmp_path: Path):
    s = Sketch(opset=opset)
    refused(s.save(tmp_path / "net.onnx", s.op("Flatten", "data"), SAMPLE), f"set {opset}")


def test_operators_that_are_not_known_are_named(tmp_path: Path):
    s = Sketch(opset=11)
    x = s.op("Erf", "data", name="gelu")
    message = refused(s.save(tmp_path / "net.onnx", s.op("Flatten", x), SAMPLE), "Erf")
    assert "gelu" in message
    s = Sketch(opset=11)
    x = s.op("Relu", "data", domain="com.example")
    refused(s.save(tmp_path / "net.onnx", s.op("Flatten", x), SAMPLE), "com.example.Relu")


def test_attributes_that_no_function_reads_are_refused(tmp_path: Path):
    s = Sketch(opset=11)
    path = s.save(tmp_path / "net.onnx", s.op("Flatten", "data", axis=1, unit=2), SAMPLE)
    refused(path, "unit")


def test_weights_in_other_files_are_not_fetched(tmp_path: Path):
    s = Sketch(opset=11)
    x = s.op("Flatten", s.op("Mul", "data", s.normal(3, 11, 9)))
    model = s.model(x, SAMPLE)
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(4 * 3 * 11 * 9))
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../" * 9 + str(secret))
    path = tmp_path / "net.onnx"
    path.write_bytes(model.SerializeToString())
    refused(path, "another file")


@pytest.mark.parametrize(
    ("sample", "match"),
    [((3, 112, 112), r"takes inputs of \[0, 3, 11, 9\]"), ((3, 9), r"expected \(N, 3, 9\)")],
)
def test_another_input_is_refused(sample: tuple[int, ...], match: str, tmp_path: Path):
    s = Sketch(opset=11)
    refused(s.save(tmp_path / "net.onnx", s.op("Flatten", "data"), SAMPLE), match, sample)


def test_an_output_that_is_no_vector_is_refused(tmp_path: Path):
    s = Sketch(opset=11)
    refused(s.save(tmp_path / "net.onnx", s.op("Relu", "data"), SAMPLE), r"expected \(1, D\)")


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path):
    s = Sketch(opset=11)
    x = s.op("Flatten", s.op("Mul", "data", s.weight([np.nan])))
    refused(s.save(tmp_path / "net.onnx", x, SAMPLE), "not finite")


def test_a_node_that_cannot_be_computed_is_named(tmp_path: Path):
    s = Sketch(opset=11)
    x = s.op("Conv", "data", s.normal(4, 5, 3, 3), name="stem")
    message = refused(s.save(tmp_path / "net.onnx", s.op("Flatten", x), SAMPLE), "cannot be run")
    assert "stem (Conv)" in message


def test_requests_for_endless_memory_are_refused(tmp_path: Path):
    s = Sketch(opset=11)
    x = s.op("ConstantOfShape", s.sizes(1, 2**40), name="bomb")
    refused(s.save(tmp_path / "net.onnx", x, SAMPLE), "bomb")
    s = Sketch(opset=11)
    x = s.op("Pad", "data", s.sizes(0, 0, 2**30, 0, 0, 0, 0, 0))
    refused(s.save(tmp_path / "net.onnx", s.op("Flatten", x), SAMPLE), "more than")


def test_a_broadcast_to_endless_memory_is_refused(tmp_path: Path):
    s = Sketch(opset=11)
    column = s.op("Mul", s.normal(2**13, 1), s.op("ReduceMean", "data", axes=[1, 2, 3], keepdims=0))
    x = s.op("Add", column, s.normal(1, 2**14), name="outer")
    x = s.op("ReduceMean", x, axes=[0])
    path = s.save(tmp_path / "net.onnx", x, SAMPLE)
    assert path.stat().st_size < 200_000
    message = refused(path, r"\[8192, 16384\] is more than")
    assert "outer (Add)" in message


def test_many_maps_are_refused_together(tmp_path: Path):
    s = Sketch(opset=11)
    mean = s.op("ReduceMean", "data", axes=[1, 2, 3], keepdims=0)
    x = s.op("Add", s.op("Mul", s.normal(2**11, 1), mean), s.normal(1, 2**12))
    for _ in range(40):
        x = s.op("Relu", x)
    x = s.op("ReduceMean", x, axes=[0])
    refused(s.save(tmp_path / "net.onnx", x, SAMPLE), r"numbers are made.*\(Relu\)")


def test_endless_products_are_refused_before_any_is_computed(tmp_path: Path):
    s = Sketch(opset=11)
    weight = s.weight(np.zeros((1500, 1500)))
    x = s.op("Mul", weight, s.op("ReduceMean", "data", axes=[1, 2, 3], keepdims=0))
    for step in range(40):
        x = s.op("MatMul", x, weight, name=f"product_{step}")
    path = s.save(tmp_path / "net.onnx", s.op("ReduceMean", x, axes=[0]), SAMPLE)
    started = time.process_time()
    message = refused(path, "operations")
    assert "product_14 (MatMul)" in message
    assert time.process_time() - started < 1.0  # the products before it take several


def test_endless_windows_are_refused(tmp_path: Path):
    s = Sketch(opset=11)
    x = s.op("Pad", "data", s.sizes(0, 0, 0, 0, 0, 0, 589, 591))
    x = s.op("MaxPool", x, kernel_shape=[300, 300], name="window")
    x = s.op("Flatten", s.op("GlobalAveragePool", x))
    assert "window" in refused(s.save(tmp_path / "net.onnx", x, SAMPLE), "operations")


def test_products_of_whole_numbers_are_refused(tmp_path: Path):
    s = Sketch(opset=11)
    whole = s.op("MatMul", s.weight([[1, 2]], np.int64), s.weight([[3], [4]], np.int64))
    x = s.op("Mul", s.op("Flatten", "data"), s.op("Cast", whole, to=TensorProto.FLOAT))
    refused(s.save(tmp_path / "net.onnx", x, SAMPLE), "whole numbers")


def test_shapes_that_follow_from_the_pixels_are_refused(tmp_path: Path):
    s = Sketch(opset=11)
    mean = s.op("ReduceMean", "data", axes=[0, 1, 2, 3], keepdims=0)
    size = s.op("Cast", s.op("Exp", mean), to=TensorProto.INT64)
    sizes = s.op("Concat", s.sizes(1), s.op("Unsqueeze", size, axes=[0]), axis=0)
    x = s.op("ConstantOfShape", sizes, name="guess")
    message = refused(s.save(tmp_path / "net.onnx", x, SAMPLE), "follow from the input's numbers")
    assert "guess" in message


def test_endless_lists_of_nodes_are_refused(tmp_path: Path):
    s = Sketch(opset=11)
    x = s.op("Flatten", "data")
    for _ in range(5000):  # ten times the largest recogniser
        x = s.op("Identity", x)
    refused(s.save(tmp_path / "net.onnx", x, SAMPLE), "5001 nodes, but expected")


def test_broken_graphs_are_refused(tmp_path: Path):
    def with_change(change: Callable[[Any], object]) -> Path:
        s = Sketch(opset=11)
        x = s.op("Mul", "data", s.normal(3, 1, 1))
        model = s.model(s.op("Flatten", s.op("Relu", x)), SAMPLE)
        change(model.graph)
        path = tmp_path / "net.onnx"
        onnx.save(model, str(path))
        return path

    refused(with_change(lambda g: g.node[1].input.__setitem__(0, "absent")), "'absent'")
    refused(with_change(lambda g: g.node[0].input.__setitem__(0, g.node[2].output[0])), "before")
    refused(with_change(lambda g: g.node[1].output.__setitem__(0, g.node[0].output[0])), "again")
    refused(with_change(lambda g: g.output[0].__setattr__("name", "absent")), "'absent'")
    refused(with_change(lambda g: g.output.append(g.input[0])), "2 outputs")
    refused(with_change(lambda g: g.input.pop()), "0 inputs")
    refused(with_change(lambda g: g.node[1].ClearField("output")), "no output")
    refused(with_change(lambda g: g.node[1].input.append("data")), "Relu")
    refused(with_change(lambda g: g.initializer[0].dims.append(7)), "weight.0 cannot be read")
    refused(with_change(lambda g: g.sparse_initializer.add()), "sparse")
