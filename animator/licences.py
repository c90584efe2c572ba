"""Licences: of models that this project can use and does not ship, and what those of data mean."""

import re
from collections.abc import Mapping
from typing import Any

INSIGHTFACE = "InsightFace model licence: non-commercial research only"
STABILITY = "Stability AI Community Licence"
CLIP = f"MIT (OpenCLIP ViT-H/14, LAION-2B); {STABILITY} as shipped in Stable Video Diffusion"
STABLEANIMATOR_V1 = (
    f"weights trained from Stable Video Diffusion ({STABILITY}) on antelopev2 embeddings "
    f"({INSIGHTFACE}); code MIT"
)
_RESTRICTED = re.compile(r"\bNC\b|non-?commercial|research only|none stated", re.IGNORECASE)


def non_commercial(licence: str) -> bool:
    """Whether a licence, by its wording, forbids commercial use, as one that is not stated does."""
    return _RESTRICTED.search(licence) is not None


def of_alignment(about: Mapping[str, Any]) -> str:
    """What the licences of its data mean for an alignment block, in one sentence.

    Args:
        about: the `config.json` of its model folder.
    """
    trained_on = about.get("trained_on")
    data = trained_on.get("alignment") if isinstance(trained_on, Mapping) else None
    if not isinstance(data, Mapping) or not data:
        return "not recorded"
    motion = data.get("motion")
    if not isinstance(motion, Mapping) or not motion:
        return "that of the clips it was trained on"
    names = ", ".join(f"{name}: {number} sequences" for name, number in sorted(motion.items()))
    if any(non_commercial(str(name)) for name in motion):
        return (
            f"non-commercial use only, as its motion capture is licensed ({names}); "
            "trained on other motion it takes the terms of that"
        )
    return f"that of its motion capture ({names})"
