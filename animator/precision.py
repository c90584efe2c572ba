"""Floating-point types of weights, by the names that settings give them."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def weights_dtype(choice: str, device: torch.device) -> torch.dtype:
    """The type of the weights for a choice on a device.

    Args:
        choice: `fp32`, `bf16`, `fp16` or `auto`: bf16 on a GPU that has it, fp16 on others and
            fp32 on the CPU.

    Raises:
        ValueError: for another name.
    """
    if choice == "auto":
        if device.type != "cuda":
            return torch.float32
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if choice not in DTYPES:
        raise ValueError(f"Got dtype {choice!r}, but expected auto, {', '.join(DTYPES)}.")
    return DTYPES[choice]
