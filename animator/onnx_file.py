"""Reading an ONNX file: its nodes and numbers, checked, without running anything.

Files come from strangers. Nothing in one is code, no other file is opened, and whatever is not
known here is refused with the name of the node.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from animator.onnx_layers import LAYERS
from animator.onnx_node import Node
from animator.onnx_shapes import SHAPES

OPERATORS = {**LAYERS, **SHAPES}
MAX_BYTES = 2**30  # four times the largest published recogniser
MAX_NODES = 4096  # iResNet-100 has some 500; small networks with computed shapes have 800
OPSETS = range(7, 26)  # what the operators follow
_OWN_DOMAIN = ("", "ai.onnx")


class OnnxError(ValueError):
    """A file that is no network this reader can run; says which file, which node and why."""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A network with one input and one output, in an order in which it can be run."""

    nodes: tuple[Node, ...]
    constants: dict[str, Tensor]  # weights: float32, int64 or bool
    input: str
    output: str
    names: tuple[str, ...]  # of all nodes in the file, those that only hold a number too


def read_graph(path: Path, sample: tuple[int, ...]) -> Graph:
    """The graph of a file.

    Args:
        sample: the shape of one input, without the batch.

    Raises:
        OnnxError: for a file that is not there, is too large, is no ONNX, keeps weights in other
            files, has operators or attributes that are not known, or takes another input.
    """
    graph, opset = _parse(path)
    constants = _constants(graph, path)
    nodes = tuple(_node(node, opset, path) for node in graph.node if node.op_type != "Constant")
    start, end = _ends(graph, constants, sample, path)
    _check_order(nodes, {start, *constants}, end, path)
    return Graph(
        nodes=nodes,
        constants=constants,
        input=start,
        output=end,
        names=tuple(str(node.name) for node in graph.node),
    )


def _parse(path: Path) -> tuple[Any, int]:
    """The file's graph and its operator set."""
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise OnnxError(f"{path}: no such file; expected an .onnx file")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise OnnxError(f"{path}: {size} bytes, but a network may have {MAX_BYTES} at most")
    try:
        # From bytes: a file that is opened by name may pull in others.
        model = onnx.load_model_from_string(path.read_bytes())
    except (DecodeError, ValueError) as error:
        raise OnnxError(f"{path}: is no ONNX file ({error}); fetch it again") from error
    graph = model.graph
    if not graph.node or not graph.output:
        raise OnnxError(f"{path}: holds no network; fetch it again")
    if len(graph.node) > MAX_NODES:
        raise OnnxError(f"{path}: {len(graph.node)} nodes, but expected {MAX_NODES} at most")
    opset = max((s.version for s in model.opset_import if s.domain in _OWN_DOMAIN), default=1)
    if opset not in OPSETS:
        raise OnnxError(
            f"{path}: operator set {opset}, but expected {OPSETS.start} to {OPSETS.stop - 1}; "
            "export it again, or convert it with onnx.version_converter"
        )
    return graph, opset


def _label(node: Any) -> str:
    return str(node.name) or f"of {next(iter(node.output), '?')}"


def _node(node: Any, opset: int, path: Path) -> Node:
    where = f"{path}: node {_label(node)}"
    operator = OPERATORS.get(node.op_type) if node.domain in _OWN_DOMAIN else None
    if operator is None:
        kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        raise OnnxError(f"{where} is the operator {kind}, which is not supported")
    attributes = {a.name: _attribute(a, where) for a in node.attribute}
    if unknown := sorted(set(attributes) - operator.attributes):
        raise OnnxError(f"{where} ({node.op_type}) has attributes {unknown}: not supported")
    if not node.output:
        raise OnnxError(f"{where} ({node.op_type}) has no output")
    return Node(
        kind=node.op_type,
        name=_label(node),
        inputs=tuple(node.input),
        output=node.output[0],
        attributes=attributes,
        opset=opset,
    )


def _attribute(attribute: Any, where: str) -> Any:
    import onnx

    kinds = onnx.AttributeProto
    if attribute.type in (kinds.INT, kinds.FLOAT):
        return onnx.helper.get_attribute_value(attribute)
    if attribute.type in (kinds.INTS, kinds.FLOATS):
        return list(onnx.helper.get_attribute_value(attribute))
    if attribute.type == kinds.STRING:
        return attribute.s.decode(errors="replace")
    if attribute.type == kinds.TENSOR:
        return _tensor(attribute.t, f"{where}, attribute {attribute.name}")
    raise OnnxError(f"{where}: attribute {attribute.name} is of a kind that is not supported")


def _tensor(tensor: Any, where: str) -> Tensor:
    """Floating-point numbers as float32, integers as int64."""
    import onnx

    if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
        raise OnnxError(f"{where} is kept in another file; save the network in one file")
    try:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype.kind in "iu":
            return torch.from_numpy(array.astype(np.int64))
        if array.dtype.kind == "b":
            return torch.from_numpy(array.copy())
        return torch.from_numpy(array.astype(np.float32))
    except (ValueError, TypeError, OverflowError, KeyError, MemoryError) as error:
        raise OnnxError(f"{where} cannot be read ({error}); fetch the file again") from error


def _constants(graph: Any, path: Path) -> dict[str, Tensor]:
    """The weights, and the outputs of `Constant` nodes."""
    if graph.sparse_initializer:
        raise OnnxError(f"{path}: has sparse weights, which are not supported")
    constants = {t.name: _tensor(t, f"{path}: weight {t.name}") for t in graph.initializer}
    for node in graph.node:
        if node.op_type != "Constant" or node.domain not in _OWN_DOMAIN:
            continue
        where = f"{path}: node {_label(node)} (Constant)"
        if len(node.attribute) != 1 or len(node.output) != 1:
            raise OnnxError(f"{where}: expected one value and one output")
        value = _attribute(node.attribute[0], where)
        if isinstance(value, str):
            raise OnnxError(f"{where} is text, which is not supported")
        if not isinstance(value, Tensor):
            whole = node.attribute[0].name.startswith("value_int")
            value = torch.tensor(value, dtype=torch.int64 if whole else torch.float32)
        constants[node.output[0]] = value
    return constants


def _ends(
    graph: Any, constants: Iterable[str], sample: tuple[int, ...], path: Path
) -> tuple[str, str]:
    """Names of the input and the output, when the input takes `(N, *sample)`."""
    # Older files list the weights among the inputs.
    weights = set(constants)
    inputs = [value for value in graph.input if value.name not in weights]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise OnnxError(
            f"{path}: {len(inputs)} inputs and {len(graph.output)} outputs, but expected one of "
            "each; use a recognition network"
        )
    kind = inputs[0].type.tensor_type
    if kind.HasField("shape"):
        sizes = [int(axis.dim_value) for axis in kind.shape.dim]  # 0 or -1: any
        fits = [n <= 0 or n == want for n, want in zip(sizes[1:], sample, strict=False)]
        if len(sizes) != len(sample) + 1 or not all(fits):
            wanted = ", ".join(["N", *map(str, sample)])
            raise OnnxError(f"{path}: takes inputs of {sizes}, but expected ({wanted})")
    return inputs[0].name, graph.output[0].name


def _check_order(nodes: Sequence[Node], given: set[str], output: str, path: Path) -> None:
    """Every node reads what is there, and no two make the same."""
    known = set(given)
    for node in nodes:
        if missing := [name for name in node.inputs if name and name not in known]:
            raise OnnxError(
                f"{path}: node {node.name} ({node.kind}) reads {missing[0]!r}, which nothing "
                "before it makes"
            )
        if node.output in known:
            raise OnnxError(f"{path}: node {node.name} ({node.kind}) makes {node.output!r} again")
        known.add(node.output)
    if output not in known:
        raise OnnxError(f"{path}: nothing makes the output {output!r}")
