"""Licences of the models that this project can use and does not ship, in one wording each."""

INSIGHTFACE = "InsightFace model licence: non-commercial research only"
STABILITY = "Stability AI Community Licence"
CLIP = f"MIT (OpenCLIP ViT-H/14, LAION-2B); {STABILITY} as shipped in Stable Video Diffusion"
STABLEANIMATOR_V1 = (
    f"weights trained from Stable Video Diffusion ({STABILITY}) on antelopev2 embeddings "
    f"({INSIGHTFACE}); code MIT"
)
