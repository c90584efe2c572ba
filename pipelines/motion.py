"""Motion capture: sequences of joints in space, read from a folder of .npz files.

T frames, N = 18 joints in COCO-18 order (`animator.keypoints`), metres, y up.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from animator.keypoints import NUM_KEYPOINTS
from pipelines.npz_files import NpzError, read_npz

MAX_FOLDER_BYTES = 2 << 30  # unpacked
MAX_METRES = 1_000.0
NO_LICENCE = "none stated"
# Licences of public sources by the name their files carry in `source`.
LICENCES = {
    "bandai": "CC BY-NC 4.0 (Bandai-Namco Research Motion Dataset)",
    "music2dance": NO_LICENCE,
}


class MotionError(NpzError):
    """A folder or file that is no motion capture."""


@dataclass(frozen=True)
class Motion:
    """One sequence of one person."""

    name: str
    joints: np.ndarray  # (T, 18, 3) float32, metres, y up
    fps: float
    source: str  # data set it comes from; empty where the file does not say
    licence: str


class MotionStore:
    """The sequences of a folder, in the order of their names.

    A file `NAME.npz` holds `joints` (T, 18, 3) in metres with y up, `fps`, and may hold `source`
    and `licence`.

    Args:
        folder: looked through itself, not the folders in it.
        licence: of all sequences, where their files and sources state none.

    Raises:
        NpzError: for a file that cannot be read; its kind MotionError for no such folder, no
            sequence in it, or a file that is not as described.
    """

    def __init__(self, folder: Path | str, licence: str = "") -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise MotionError(
                f"{self.folder} is no folder: expected one with motion capture in NAME.npz files."
            )
        paths = sorted(self.folder.glob("*.npz"), key=lambda path: path.name)
        if not paths:
            raise MotionError(
                f"{self.folder} holds no .npz file: expected motion capture with joints "
                f"(T, {NUM_KEYPOINTS}, 3) and fps in each."
            )
        left = MAX_FOLDER_BYTES
        motions = []
        for path in paths:
            motions.append(_read(path, licence))
            left -= motions[-1].joints.nbytes
            if left < 0:
                raise MotionError(
                    f"{self.folder} holds more than {MAX_FOLDER_BYTES} bytes of joints: "
                    "spread it over several folders."
                )
        self.motions: tuple[Motion, ...] = tuple(motions)

    def __len__(self) -> int:
        return len(self.motions)

    @property
    def num_frames(self) -> int:
        """Frames of all sequences together."""
        return sum(len(motion.joints) for motion in self.motions)

    @property
    def licences(self) -> Mapping[str, int]:
        """How many sequences are under each licence."""
        found: dict[str, int] = {}
        for motion in self.motions:
            found[motion.licence] = found.get(motion.licence, 0) + 1
        return dict(sorted(found.items()))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, rates and joints: equal for equal data, wherever it lies."""
        digest = hashlib.sha256()
        for motion in self.motions:
            digest.update(f"{motion.name} {motion.fps!r} {motion.joints.shape}\n".encode())
            digest.update(np.ascontiguousarray(motion.joints, "<f4").tobytes())
        return digest.hexdigest()


def _read(path: Path, licence: str) -> Motion:
    arrays = read_npz(path)
    for name in ("joints", "fps"):
        if name not in arrays:
            found = ", ".join(sorted(arrays)) or "nothing"
            raise MotionError(f"{path}: has {found}, expected joints and fps: save both.")
    joints, fps = arrays["joints"], arrays["fps"]
    shape = f"(T, {NUM_KEYPOINTS}, 3)"
    if joints.dtype.kind != "f" or joints.ndim != 3 or joints.shape[1:] != (NUM_KEYPOINTS, 3):
        raise MotionError(
            f"{path}: joints is {joints.dtype} {joints.shape}, expected float {shape}, joints in "
            "COCO-18 order."
        )
    if len(joints) < 2:
        raise MotionError(f"{path}: has {len(joints)} frames, expected at least 2: leave it out.")
    if not (np.abs(joints) <= MAX_METRES).all():  # false for NaN too
        raise MotionError(
            f"{path}: joints holds NaN or numbers beyond {MAX_METRES:g}, expected metres: fill "
            "gaps, or cut the sequence there."
        )
    rate = float(fps) if fps.ndim == 0 and fps.dtype.kind in "fiu" else 0.0
    if not 0 < rate <= 1000:
        raise MotionError(f"{path}: fps is {fps}, expected one number above 0 and at most 1000.")
    source = str(arrays["source"]) if "source" in arrays else ""
    stated = str(arrays["licence"]) if "licence" in arrays else LICENCES.get(source, "")
    return Motion(
        name=path.stem,
        joints=np.ascontiguousarray(joints, np.float32),
        fps=rate,
        source=source,
        licence=stated or licence or NO_LICENCE,
    )
