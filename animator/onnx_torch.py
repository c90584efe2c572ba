"""An ONNX network as a torch module, so that gradients reach its input.

A recognition network is a short list of convolutions. Its file is read once by `onnx_file` and run
node by node with the functions of `onnx_layers` and `onnx_shapes`.

Shapes: N batch, D numbers in the output.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from animator.onnx_file import OPERATORS, Graph, OnnxError, read_graph
from animator.onnx_limits import ShapeRun
from animator.onnx_node import Node


class OnnxNetwork(nn.Module):
    """A network with one input and one output, frozen, as at inference in every mode.

    Its floating-point numbers are buffers, which follow `.to(device, dtype)`. They stay out of
    `state_dict`: they belong to their file, and to its licence.

    Args:
        graph: from `read_graph`.
        sample: the shape of one input, without the batch.

    Raises:
        OnnxError: for a graph that cannot be run, or does not map `(N, *sample)` to `(N, D)`.
    """

    def __init__(self, graph: Graph, sample: tuple[int, ...]):
        super().__init__()
        self.node_names = graph.names
        self._nodes = graph.nodes
        self._input, self._output = graph.input, graph.output
        self._finished = _last_uses(graph.nodes, graph.output)
        self._buffer_names: dict[str, str] = {}
        self._integers: dict[str, Tensor] = {}  # sizes and the like, which stay on the CPU
        for name, value in graph.constants.items():
            if value.is_floating_point():
                self._buffer_names[name] = f"constant_{len(self._buffer_names)}"
                self.register_buffer(self._buffer_names[name], value, persistent=False)
            else:
                self._integers[name] = value
        self._one_by_one = False
        self.dim = self._try(sample)

    @classmethod
    def from_file(cls, path: str | Path, sample: tuple[int, ...]) -> "OnnxNetwork":
        """The network of an `.onnx` file; OnnxError, with its name, where that is not one."""
        graph = read_graph(Path(path), sample)
        try:
            return cls(graph, sample)
        except OnnxError as error:
            raise OnnxError(f"{path}: {error}") from error

    @property
    def dtype(self) -> torch.dtype:
        """The type that the network computes in."""
        return next((buffer.dtype for buffer in self.buffers()), torch.float32)

    def forward(self, samples: Tensor) -> Tensor:
        """`(N, *sample)` to `(N, D)`, which is of the network's type."""
        samples = samples.to(self.dtype)
        if self._one_by_one and len(samples) > 1:
            return torch.func.vmap(lambda sample: self._run(sample[None])[0])(samples)
        return self._run(samples)

    def _run(self, samples: Tensor) -> Tensor:
        values: dict[str, Tensor] = {self._input: samples, **self._integers}
        values.update((name, self.get_buffer(own)) for name, own in self._buffer_names.items())
        for node, finished in zip(self._nodes, self._finished, strict=True):
            inputs = [values[name] if name else None for name in node.inputs]
            try:
                inputs = _in_one_place(inputs, samples)
                values[node.output] = OPERATORS[node.kind].run(node, *inputs)
            except Exception as error:
                error.add_note(f"in the ONNX node {node.name} ({node.kind})")
                raise
            for name in finished:
                del values[name]
        return values[self._output]

    def _run_shapes(self, samples: Tensor) -> None:
        """Go through the graph without computing; ValueError where it asks for too much."""
        with ShapeRun(len(samples)):
            self._run(samples.to("meta"))

    @torch.no_grad()
    def _try(self, sample: tuple[int, ...]) -> int:
        """Run it, and find out whether the graph carries a batch; the output's D.

        Exporters write the batch of their example into the graph. Such a network takes each input
        of a batch by itself.
        """
        generator = torch.Generator().manual_seed(0)
        pair = torch.rand((2, *sample), generator=generator) * 2 - 1
        try:
            self._run_shapes(pair[1:])
            single = self._run(pair[1:])
        except Exception as error:  # whatever torch raises for a node's numbers
            raise OnnxError(f"cannot be run: {_reason(error)}") from error
        if single.ndim != 2 or len(single) != 1:
            raise OnnxError(
                f"an input of {[1, *sample]} gives {list(single.shape)}, but expected (1, D); "
                "use a recognition network"
            )
        if not bool(torch.isfinite(single).all()):
            raise OnnxError("gives numbers that are not finite; fetch the file again")
        try:
            self._run_shapes(pair)
            both = self._run(pair)
        except Exception:  # a batch of two is what the graph may not be made for
            self._one_by_one = True
        else:
            tolerance = 1e-3 * float(single.abs().max())
            self._one_by_one = both.shape != (2, single.shape[1]) or not torch.allclose(
                both[1:], single, rtol=0, atol=tolerance
            )
        return single.shape[1]


def _in_one_place(inputs: Sequence[Tensor | None], samples: Tensor) -> list[Tensor | None]:
    """Numbers that were computed from sizes join the samples' device and type where they meet."""
    if samples.is_meta:  # shapes alone, for which numbers stay what they are
        return list(inputs)

    def stray(value: Tensor) -> bool:
        return value.dtype != samples.dtype or value.device != samples.device

    floats = [value for value in inputs if value is not None and value.is_floating_point()]
    if not any(map(stray, floats)) or all(map(stray, floats)):
        return list(inputs)
    return [
        value.to(samples) if value is not None and value.is_floating_point() else value
        for value in inputs
    ]


def _reason(error: BaseException) -> str:
    notes: list[str] = getattr(error, "__notes__", [])
    return "; ".join([str(error).split("\n")[0], *notes])


def _last_uses(nodes: Sequence[Node], output: str) -> list[list[str]]:
    """For each node what nobody reads after it, so that feature maps are freed on the way."""
    last = {node.output: index for index, node in enumerate(nodes)}
    made = set(last)
    for index, node in enumerate(nodes):
        last.update((name, index) for name in node.inputs if name in made)
    finished: list[list[str]] = [[] for _ in nodes]
    for name, index in last.items():
        if name != output:
            finished[index].append(name)
    return finished
