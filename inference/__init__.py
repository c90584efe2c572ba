"""Inference: samplers, the animation pipeline, offline batches and the job server."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inference.engine import AnimationEngine as AnimationEngine
    from inference.pipeline import AnimationPipeline as AnimationPipeline
    from inference.requests import AnimationRequest as AnimationRequest

__all__ = ["AnimationEngine", "AnimationPipeline", "AnimationRequest"]

_HOMES = {
    "AnimationEngine": "inference.engine",
    "AnimationPipeline": "inference.pipeline",
    "AnimationRequest": "inference.requests",
}


def __getattr__(name: str) -> Any:
    # Looked up when asked for: the light modules of this package must not load torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
