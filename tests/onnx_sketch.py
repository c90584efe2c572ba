"""Small ONNX networks for tests, written node by node, and what ONNX Runtime makes of them."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor


class Sketch:
    """A network being written; `op` and `weight` give the names of what they add."""

    def __init__(self, *, opset: int, seed: int = 0):
        self.opset = opset
        self.rng = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def weight(self, value: Any, kind: Any = np.float32) -> str:
        """An initializer with these numbers."""
        name = f"weight.{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value, kind), name))
        return name

    def sizes(self, *values: int) -> str:
        """An initializer with integers."""
        return self.weight(values, np.int64)

    def normal(self, *shape: int, scale: float = 1.0) -> str:
        """An initializer with random numbers."""
        return self.weight(self.rng.normal(size=shape) * scale)

    def op(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """A node with one output."""
        output = f"value/{len(self.nodes)}"
        name = f"{kind}_{len(self.nodes)}" if name is None else name
        self.nodes.append(helper.make_node(kind, inputs, [output], name=name, **attributes))
        return output

    def conv(self, x: str, channels: tuple[int, int], kernel: int = 3, **attributes: Any) -> str:
        """A convolution from and to these numbers of channels."""
        fan = channels[0] * kernel * kernel // attributes.get("group", 1)
        shape = (channels[1], channels[0] // attributes.get("group", 1), kernel, kernel)
        return self.op(
            "Conv", x, self.normal(*shape, scale=fan**-0.5), self.normal(channels[1]), **attributes
        )

    def batch_norm(self, x: str, channels: int, **attributes: Any) -> str:
        """A batch normalisation with random statistics."""
        scale, bias, mean = (self.normal(channels, scale=0.5) for _ in range(3))
        variance = self.weight(0.5 + self.rng.random(channels))
        return self.op("BatchNormalization", x, scale, bias, mean, variance, **attributes)

    def model(
        self, output: str, sample: tuple[int, ...], *, batch: int | str = "N", listed: bool = False
    ) -> Any:
        """The whole; `listed` puts the weights among the inputs, as old exporters did."""
        inputs = [helper.make_tensor_value_info("data", TensorProto.FLOAT, [batch, *sample])]
        if listed:
            inputs += [
                helper.make_tensor_value_info(w.name, w.data_type, list(w.dims))
                for w in self.weights
            ]
        outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)]
        graph = helper.make_graph(self.nodes, "sketch", inputs, outputs, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
        model.ir_version = 3 if listed else 8
        return model

    def save(self, path: Path, output: str, sample: tuple[int, ...], **how: Any) -> Path:
        """Write the network to a file."""
        onnx.save(self.model(output, sample, **how), str(path))
        return path


def runtime(path: Path, samples: Tensor) -> Tensor:
    """What ONNX Runtime gives for a float32 batch."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: samples.numpy()})
    return torch.from_numpy(np.asarray(result))
