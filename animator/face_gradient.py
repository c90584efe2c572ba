"""A bound on the gradient that flows back into the face tokens in training.

An untrained Face Encoder gives face features without any spread, and the ID adapter divides by
that spread (eq. 14): their gradient is then some 1e5 times that of everything else, and clipping
by the global norm would stop all other weights for as long as it lasts.
Shapes: B batch, F face tokens, D context width.
"""

import torch
from torch import Tensor

# Small networks start at ratios of 1e4 to 1e6 and are at 0.05 to 0.2 after some 150 steps.
FACE_GRADIENT_LIMIT = 1.0


def limit_gradient(context: Tensor, prediction: Tensor, limit: float) -> None:
    """Keep the gradient of each clip's face tokens within `limit` times that of its prediction.

    The bound is relative, so it holds whatever the loss is multiplied by on the way: the number
    of workers and of accumulated batches, the weight of a noise level, a loss scale. A gradient
    that is not finite stays so. To be called on the two ends of one forward pass, before the way
    back.

    Args:
        context: image token and face tokens, `(B, 1 + F, D)`; of the image token, which is
            frozen, nothing flows on.
        prediction: of the network, `(B, ...)`.
    """
    if not (context.requires_grad and prediction.requires_grad):
        return
    norms: list[Tensor] = []

    def see(gradient: Tensor) -> None:
        norms.append(_norm(gradient))

    def bound(gradient: Tensor) -> Tensor | None:
        if not norms:  # a way back that did not start at the prediction
            return None
        own, allowed = _norm(gradient[:, 1:]), limit * norms.pop()
        share = torch.where(own > allowed, allowed / own, torch.ones_like(own))
        return gradient * share.to(gradient.dtype)[:, None, None]

    prediction.register_hook(see)
    context.register_hook(bound)


def _norm(gradient: Tensor) -> Tensor:
    """Of each clip, in fp32: `(B,)`."""
    return gradient.float().flatten(1).norm(dim=1)
