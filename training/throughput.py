"""The most that a device can compute, which model FLOP utilisation (MFU) is a share of.

MFU = model FLOPs a sample x samples a second / peak FLOPs a second of all workers (Chowdhery et
al., arXiv:2204.02311, appendix B): what is recomputed in the backward pass is not counted.
"""

import re
from typing import Any

# Dense peaks in FLOPs a second with accumulation in fp32, from NVIDIA's data sheets, which print
# twice that for Hopper and Ada ("with sparsity"): (pattern of the name, bf16, TF32, fp32).
# The first pattern that is found holds.
_PEAKS: tuple[tuple[str, float, float, float], ...] = (
    (r"\bB200\b", 2250e12, 1125e12, 75e12),
    (r"\bGH200\b|\bH200 NVL\b|\bH100 NVL\b", 835e12, 417.5e12, 60e12),
    (r"\bH200\b", 989.4e12, 494.7e12, 66.9e12),
    (r"\bH100 PCIe\b", 756e12, 378e12, 51.2e12),
    (r"\bH100\b", 989.4e12, 494.7e12, 66.9e12),
    (r"\bA100\b", 312e12, 156e12, 19.5e12),
    (r"\bA800\b", 312e12, 156e12, 19.5e12),
    (r"\bL40S\b", 362e12, 183e12, 91.6e12),
    (r"\bL40\b", 181e12, 90.5e12, 90.5e12),
    (r"\bL4\b", 121e12, 60e12, 30.3e12),
    (r"\bA40\b", 149.7e12, 74.8e12, 37.4e12),
    (r"\bA30\b", 165e12, 82e12, 10.3e12),
    (r"\bA10\b", 125e12, 62.5e12, 31.2e12),
    (r"\bRTX A6000\b", 154.8e12, 77.4e12, 38.7e12),
    (r"\bRTX 4090(?! Laptop)\b", 165.2e12, 82.6e12, 82.6e12),
    (r"\bRTX 3090(?! Laptop)\b", 71e12, 35.6e12, 35.6e12),
)


def peak_flops(device: Any, precision: str) -> float | None:
    """The most FLOPs a second that one device can do; None where it is not known.

    Args:
        device: a `torch.device`.
        precision: `bf16`, or `fp32`: then TF32's peak where torch may use it.
    """
    if device.type != "cuda":
        return None  # of a CPU no name tells it
    import torch

    allowed = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    name = torch.cuda.get_device_name(device)
    return peak_of(name, "tf32" if precision == "fp32" and allowed else precision)


def peak_of(name: str, precision: str) -> float | None:
    """The dense peak, in FLOPs a second, of a GPU by the name that its driver gives it.

    Args:
        precision: `bf16`, `tf32` or `fp32`.

    Raises:
        ValueError: for another precision.
    """
    columns = ("bf16", "tf32", "fp32")
    if precision not in columns:
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(columns)}.")
    for pattern, *peaks in _PEAKS:
        if re.search(pattern, name):
            return peaks[columns.index(precision)]
    return None
