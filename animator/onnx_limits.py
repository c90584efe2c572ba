"""What a network may ask for: a run without numbers, before anything is allocated or computed.

A small file can ask for endless memory or time with a few broadcast additions or products. Here
its operations are gone through by their shapes alone, and the first one beyond a limit is refused.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from animator.onnx_node import require_elements

# For one sample of 112 x 112 pixels iResNet-100 makes 22 million numbers in 28e9 operations, and
# iResNet-200 twice as many.
MAX_MADE = 2**28  # numbers in all feature maps together
MAX_WORK = 10**11  # operations: some seconds on one core
_PER_NUMBER = 32  # operations in the time that reading or writing a number takes
_PER_CALL = 10**6  # and in the time that starting any function takes
_SMALL = 2**12  # numbers that are computed all the same: sizes, from which shapes follow


class ShapeRun(TorchDispatchMode):
    """Within it, torch functions of tensors on the `meta` device only follow their shapes.

    Tensors elsewhere keep their numbers, so that shapes can be computed from sizes; what takes
    more than a few numbers from them is on `meta` as well.

    Args:
        batch: how many samples are run; the limits are for one.

    Raises:
        ValueError: in place of a function that would make too many numbers, that is too much work
            together with what ran before it, or that needs the numbers of a tensor on `meta`.
    """

    def __init__(self, batch: int):
        super().__init__()
        self._batch = batch
        self.made = 0
        self.work = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = _tensors([args, kwargs])
        if func is torch.ops.aten._local_scalar_dense.default:
            if given[0].is_meta:
                raise ValueError("a setting follows from the input's numbers: not supported")
            return func(*args, **kwargs)
        settings = {"device": "meta"} if "device" in kwargs or not given else {}
        shapes = tree_map_only(Tensor, _shape_of, (args, kwargs))
        result = func(*shapes[0], **{**shapes[1], **settings})
        cost = self._account(func, shapes, _tensors(result))
        stays = not any(tensor.is_meta for tensor in given) and kwargs.get("device") != _META
        if stays and (func.is_view or cost <= _SMALL * _PER_NUMBER + _PER_CALL):
            return func(*args, **kwargs)
        return result

    def _account(self, func: Any, shapes: tuple[Any, Any], results: list[Tensor]) -> int:
        """Add a call to what was done; how much work it is."""
        cost = _PER_CALL
        if not func.is_view:
            given = _tensors(shapes)
            for tensor in results:
                require_elements(tensor.shape, self._batch)
            made = _numel(results)
            self.made += made
            cost += _PER_NUMBER * (_numel(given) + made)
            if "pool" in str(func):
                cost += _PER_NUMBER * results[0].numel() * math.prod(shapes[0][1])
            if count := flop_registry.get(func.overloadpacket):
                if not results[0].is_floating_point():
                    raise ValueError("products of whole numbers are not supported")
                out = results[0] if len(results) == 1 else tuple(results)
                cost += count(*shapes[0], **shapes[1], out_val=out)
        self.work += cost
        if self.made > MAX_MADE * self._batch:
            raise ValueError(f"up to here more than {MAX_MADE} numbers are made of one sample")
        if self.work > MAX_WORK * self._batch:
            raise ValueError(f"up to here one sample takes more than {MAX_WORK:.0e} operations")
        return cost


_META = torch.device("meta")


def _shape_of(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _numel(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
