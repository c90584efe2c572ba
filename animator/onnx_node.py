"""What the functions for ONNX operators share: a node of a graph, and the table they stand in."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

# Numbers in one tensor of one sample; a recogniser's largest feature map, or weight, is far below.
MAX_ELEMENTS = 2**26


@dataclass(frozen=True, kw_only=True)
class Node:
    """One operation of a graph; an input that is left out is an empty name."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, Any]
    opset: int

    def get(self, attribute: str, default: Any) -> Any:
        """The attribute, or what the specification says where it is not given."""
        return self.attributes.get(attribute, default)


@dataclass(frozen=True, kw_only=True)
class Operator:
    """A function of a node and its inputs, and the attributes that it knows."""

    run: Callable[..., Tensor]
    attributes: frozenset[str]


class Table(dict[str, Operator]):
    """Operators by their ONNX names."""

    def add(self, kinds: str, attributes: str = "") -> Callable[..., Callable[..., Tensor]]:
        """Enter the decorated function under one or more names, separated by spaces."""

        def register(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
            for kind in kinds.split():
                self[kind] = Operator(run=run, attributes=frozenset(attributes.split()))
            return run

        return register


def integers(sizes: Tensor) -> list[int]:
    """The numbers of an integer tensor."""
    if sizes.is_floating_point():
        raise ValueError("sizes must be integers")
    if sizes.is_meta:
        raise ValueError("sizes follow from the input's numbers, which is not supported")
    return sizes.reshape(-1).tolist()


def require_elements(shape: Sequence[int], batch: int = 1) -> None:
    """ValueError for a shape that no recogniser has, with so many samples."""
    if math.prod(shape) > MAX_ELEMENTS * batch:
        raise ValueError(f"a tensor of {list(shape)} is more than {MAX_ELEMENTS * batch} numbers")


def pad_axes(x: Tensor, begin: Sequence[int], end: Sequence[int], value: float = 0.0) -> Tensor:
    """Pad the last axes by a constant; negative amounts crop."""
    amounts = [n for pair in zip(reversed(begin), reversed(end), strict=True) for n in pair]
    return F.pad(x, amounts, value=value) if any(amounts) else x


def as_matrix(x: Tensor, axis: int) -> Tensor:
    """The axes before `axis`, and those from it on, as the two axes of a matrix."""
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def axes_of(node: Node, given: Tensor | None) -> list[int]:
    """Axes are an attribute in older operator sets and an input in newer ones."""
    return list(node.get("axes", [])) if given is None else integers(given)
