"""Which weights of the animator are trained, by name, and what a low-rank training leaves.

PoseNet and Face Encoder start from scratch and are trained in every set.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from animator.id_adapter import IDAdapter
from animator.model import Animator
from animator.unet import idle_parameters

Trainable = Literal["all", "attentions", "adapters", "lora"]

_ADAPTER = "default"  # the name that peft puts into those of the low-rank tensors
_LORA_A, _LORA_B = f".lora_A.{_ADAPTER}.weight", f".lora_B.{_ADAPTER}.weight"
_BASE = ".base_layer."


def choose_trainable(
    model: Animator, what: Trainable, *, rank: int = 16, alpha: float = 16.0
) -> None:
    """Set which weights get gradients; `lora` also adds the low-rank tensors.

    - `all`: every weight that decides anything (the queries and keys of attention over one
      token decide nothing and stay frozen in every set).
    - `attentions`: of the UNet, every weight with `attentions` in its name, as v1; the ID
      adapters are among them.
    - `adapters`: of the UNet, the keys and values of the ID adapters alone.
    - `lora`: the same, and low-rank updates of the queries, keys, values and output projections
      of all attention (Hu et al., arXiv:2106.09685), which are added by peft. The names of the
      weights change: `merged_state` gives back those of a plain animator.

    Args:
        rank, alpha: of the low-rank updates, which are multiplied by alpha / rank.

    Raises:
        ValueError: for another name, a rank below 1, or a model that has low-rank tensors.
    """
    if what not in ("all", "attentions", "adapters", "lora"):
        raise ValueError(f"Got {what!r}, but expected all, attentions, adapters or lora.")
    if any(".lora_A." in name for name, _ in model.named_parameters()):
        raise ValueError("This model has low-rank tensors already: build or load it again.")
    idle = idle_parameters(model.unet)
    adapters = {
        f"{name}.{own}"
        for name, module in model.unet.named_modules()
        if isinstance(module, IDAdapter)
        for own, _ in module.named_parameters()
    }
    for name, parameter in model.unet.named_parameters():
        chosen = what == "all" or name in adapters
        chosen = chosen or (what == "attentions" and "attentions" in name)
        parameter.requires_grad_(chosen and name not in idle)
    for part in (model.pose_net, model.face_encoder):
        part.requires_grad_(True)
    if what == "lora":
        _add_low_rank(model.unet, rank, alpha, idle)


def _add_low_rank(unet: nn.Module, rank: int, alpha: float, idle: set[str]) -> None:
    """Low-rank updates of every projection of attention that decides anything."""
    from peft import LoraConfig, inject_adapter_in_model

    if rank < 1:
        raise ValueError(f"Got rank {rank}, but expected at least 1.")
    ends = tuple(
        f".attn{i}.{part}" for i in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")
    )
    targets = [
        name
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(ends) and f"{name}.weight" not in idle
    ]
    trained = {name for name, p in unet.named_parameters() if p.requires_grad}
    # peft takes whole numbers alone by its types; it only ever divides alpha by the rank.
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)  # type: ignore[arg-type]
    inject_adapter_in_model(settings, unet, adapter_name=_ADAPTER)
    for name, parameter in unet.named_parameters():  # peft froze all but its own
        parameter.requires_grad_(name in trained or ".lora_" in name)


def merged_state(state: Mapping[str, Tensor], alpha: float | None = None) -> dict[str, Tensor]:
    """The state of a plain animator: low-rank updates added to the weights they belong to.

    A state without low-rank tensors comes back as it is. Sums are made in fp32 and stored in the
    type of the weights.

    Args:
        state: of the whole model, also of its frozen weights.
        alpha: as in `choose_trainable`.

    Raises:
        ValueError: for low-rank tensors without alpha or without the weights they belong to.
    """
    if not any(name.endswith(_LORA_A) for name in state):
        return dict(state)
    if alpha is None:
        raise ValueError("Got low-rank tensors without alpha, but expected what they trained with.")
    merged: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".lora_" in name:
            continue
        module, _, own = name.rpartition(_BASE)
        if own == "weight" and (down := state.get(f"{module}{_LORA_A}")) is not None:
            up = state[f"{module}{_LORA_B}"]
            update = (alpha / len(down)) * (up.float() @ down.float().to(up.device))
            value = (value.float() + update.to(value.device)).to(value.dtype)
        merged[name.replace(_BASE, ".")] = value
    updated = {name.removesuffix(_LORA_A) for name in state if name.endswith(_LORA_A)}
    if missing := sorted(name for name in updated if f"{name}.weight" not in merged):
        raise ValueError(
            f"Got low-rank tensors of {missing[0]} without its weight, but expected the state of "
            "the whole model."
        )
    return merged


def lora_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The low-rank tensors alone, named as peft writes them: `….to_q.lora_A.weight`.

    `(rank, in)` for A, `(out, rank)` for B; the update is alpha / rank · B·A.
    """
    return {
        name.replace(f".{_ADAPTER}.weight", ".weight"): value
        for name, value in state.items()
        if ".lora_" in name
    }


def count_trainable(model: nn.Module) -> int:
    """Number of weights that get gradients."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
