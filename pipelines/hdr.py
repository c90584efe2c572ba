"""High dynamic range to 8-bit RGB: PQ and HLG over BT.2020 to BT.709 (ITU-R BT.2100, BT.2408).

H W height and width
"""

from functools import lru_cache

import numpy as np

PQ, HLG = 16, 18  # AVColorTransferCharacteristic: SMPTE2084, ARIB_STD_B67
TRANSFERS = (PQ, HLG)
WHITE_NITS = 203.0  # diffuse white of HDR programmes (BT.2408), shown as white
KNEE = 0.8
LEVELS = 65536
BT2020_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]],
    np.float32,
)


def to_sdr(signal: np.ndarray, transfer: int) -> np.ndarray:
    """uint16 RGB (H, W, 3) coded with `transfer` over BT.2020 primaries to uint8 BT.709 RGB."""
    light = _light_table(transfer)[signal] @ BT2020_TO_BT709.T
    # Above the knee highlights roll off towards white instead of being cut.
    bright = 1 - (1 - KNEE) * np.exp(np.minimum(KNEE - light, 0) / (1 - KNEE))
    light = np.where(light > KNEE, bright, np.maximum(light, 0))
    return np.rint(255 * light ** (1 / 2.4)).astype(np.uint8)


@lru_cache(maxsize=2)
def _light_table(transfer: int) -> np.ndarray:
    """Linear light for every 16-bit code value, 1 = diffuse white."""
    code = np.linspace(0, 1, LEVELS)
    if transfer == PQ:
        m1, m2 = 2610 / 16384, 2523 / 4096 * 128
        c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
        root = code ** (1 / m2)
        nits = 10000 * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)
    else:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        scene = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
        nits = 1000 * scene**1.2
    return (nits / WHITE_NITS).astype(np.float32)
