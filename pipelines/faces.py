"""Faces in a frame: boxes, five landmarks, and an embedding of who it is.

Two backends behind one protocol: an InsightFace pack, and the cascade that ships in scikit-image,
which needs no file but knows no identity. Frames are uint8 RGB (H, W, 3); boxes are xyxy and
landmarks xy in 0..1 of the frame.

H W height and width, D embedding size
"""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from animator import licences
from pipelines.models import ENVIRONMENT, face_packs, locate_face_pack

MIN_SCORE = 0.5
# The smaller inputs see faces that fill the frame, but also faces that are none.
SURE_SCORE = 0.6
DETECTION_SIZES = (640, 320)
CASCADE_SIDE = 480
OVERLAP = 0.4


class FaceError(ValueError):
    """A face backend that cannot be opened; the message says how to mend it."""


@dataclass(kw_only=True)
class Face:
    """One face; landmarks are eyes, nose, mouth corners (left to right in the picture) or NaN."""

    box: np.ndarray
    score: float
    landmarks: np.ndarray = field(default_factory=lambda: np.full((5, 2), np.nan, np.float32))
    embedding: np.ndarray | None = None

    @property
    def area(self) -> float:
        """Share of the frame that the box covers."""
        return float(np.prod(np.maximum(self.box[2:] - self.box[:2], 0)))


class FaceBackend(Protocol):
    """What the rooms use of a face model."""

    name: str
    licence: str
    reason: str
    embedding_dim: int
    channel_order: str

    def detect(self, frame: np.ndarray) -> list[Face]:
        """Faces of a frame, largest first, without embeddings."""
        ...

    def embed(self, frame: np.ndarray, face: Face) -> np.ndarray:
        """Un-normalised embedding (D,) of a detected face."""
        ...


class InsightFaceBackend:
    """A folder with an InsightFace pack: a detector and a recogniser, whatever their file names."""

    licence = licences.INSIGHTFACE
    channel_order = "rgb"

    def __init__(self, folder: str | Path, *, threads: int = 2, reason: str = ""):
        folder = Path(folder)
        if not folder.is_dir() or not list(folder.glob("*.onnx")):
            raise FaceError(f"{folder}: no InsightFace pack; expected a folder of .onnx files")
        self._app = _load_pack(folder, threads)
        models: dict[str, Any] = self._app.models
        if "recognition" not in models:
            raise FaceError(f"{folder}: the pack has no recognition network; use a whole pack")
        self._recogniser = models["recognition"]
        self._detector = models["detection"]
        self.name = f"insightface:{folder.name}"
        self.reason = reason or f"asked for the pack {folder}"
        self.providers = self._detector.session.get_providers()
        shape = self._recogniser.output_shape[-1]
        self.embedding_dim = shape if isinstance(shape, int) else self._measured_dim()

    @property
    def recogniser_path(self) -> Path:
        """The recognition network's file."""
        return Path(self._recogniser.model_file)

    def _measured_dim(self) -> int:
        size = self._recogniser.input_size
        return int(self._recogniser.get_feat(np.zeros((*size, 3), np.uint8)).size)

    def detect(self, frame: np.ndarray) -> list[Face]:
        """Faces of a frame, largest first.

        A face that fills the frame is not seen at the size that small ones need, or only half, so
        a frame without a sure face is looked at smaller and then with a border around it.
        """
        bgr = np.ascontiguousarray(frame[..., ::-1])
        first, *smaller = DETECTION_SIZES
        unsure = self._detect(bgr, first, MIN_SCORE)
        if any(face.score >= SURE_SCORE for face in unsure):
            return unsure
        for size in smaller:
            if faces := self._detect(bgr, size, SURE_SCORE):
                return faces
        border = max(frame.shape[:2]) // 2
        padded = np.pad(bgr, ((border, border), (border, border), (0, 0)))
        return self._detect(padded, DETECTION_SIZES[-1], SURE_SCORE, border) or unsure

    def _detect(self, bgr: np.ndarray, size: int, min_score: float, border: int = 0) -> list[Face]:
        boxes, landmarks = self._detector.detect(bgr, input_size=(size, size))
        height, width = (side - 2 * border for side in bgr.shape[:2])
        scale = np.array([width, height], np.float32)
        faces = []
        for index, row in enumerate(boxes):
            if row[4] < min_score:
                continue
            box = ((row[:4].reshape(2, 2) - border) / scale).clip(0, 1).reshape(4)
            face = Face(box=box.astype(np.float32), score=float(row[4]))
            if landmarks is not None:
                face.landmarks = ((landmarks[index] - border) / scale).astype(np.float32)
            if face.area > 0:
                faces.append(face)
        return _largest_first(faces)

    def embed(self, frame: np.ndarray, face: Face) -> np.ndarray:
        """Un-normalised embedding (D,); FaceError for a face without landmarks."""
        if not np.isfinite(face.landmarks).all():
            raise FaceError("the face has no landmarks; detect it with the same backend")
        from insightface.app.common import Face as PackFace

        height, width = frame.shape[:2]
        points = face.landmarks * np.array([width, height], np.float32)
        aligned = PackFace(kps=points.astype(np.float32))
        bgr = np.ascontiguousarray(frame[..., ::-1])
        with warnings.catch_warnings():
            # The package aligns with a call that scikit-image is about to rename.
            warnings.simplefilter("ignore", FutureWarning)
            return np.asarray(self._recogniser.get(bgr, aligned), np.float32).reshape(-1)


def _load_pack(folder: Path, threads: int) -> Any:
    import onnxruntime
    from insightface.app import FaceAnalysis

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    available = onnxruntime.get_available_providers()
    wanted = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in available]
    try:
        app = FaceAnalysis(
            name=str(folder),
            allowed_modules=["detection", "recognition"],
            providers=wanted,
            sess_options=options,
        )
    except AssertionError:
        raise FaceError(f"{folder}: the pack has no detection network; use a whole pack") from None
    except Exception as error:  # the pack's own loaders raise what onnx, protobuf and ORT raise
        raise FaceError(f"{folder}: the pack cannot be loaded ({error}); fetch it again") from error
    device = 0 if wanted[0] == "CUDAExecutionProvider" else -1
    app.prepare(ctx_id=device, det_thresh=MIN_SCORE, det_size=(640, 640))
    return app


class CascadeBackend:
    """The frontal-face LBP cascade of scikit-image: no download, no landmarks, no identity.

    It gives no confidence: every face is scored 1.
    """

    name = "cascade"
    licence = "BSD-3-Clause (scikit-image)"
    embedding_dim = 0
    channel_order = "rgb"

    def __init__(self, *, reason: str = ""):
        from skimage import data
        from skimage.feature import Cascade

        self._cascade = Cascade(data.lbp_frontal_face_cascade_filename())
        self.reason = reason or "asked for the cascade"

    def detect(self, frame: np.ndarray) -> list[Face]:
        """Frontal faces of a frame, largest first."""
        import cv2

        scale = min(1.0, CASCADE_SIDE / max(frame.shape[:2]))
        height, width = (max(1, round(side * scale)) for side in frame.shape[:2])
        small = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
        shortest = min(height, width)
        if shortest < 24:
            return []
        found = self._cascade.detect_multi_scale(
            small, 1.2, 1, (24, 24), (shortest, shortest), min_neighbor_number=4
        )
        size = np.array([width, height, width, height], np.float32)
        corners = [[d["c"], d["r"], d["c"] + d["width"], d["r"] + d["height"]] for d in found]
        boxes = [np.asarray(corner, np.float32) / size for corner in corners]
        faces: list[Face] = []
        for face in _largest_first([Face(box=box.clip(0, 1), score=1.0) for box in boxes]):
            # The cascade answers at several scales: a box mostly inside a larger one is the same.
            if all(_covered(face.box, other.box) < OVERLAP for other in faces):
                faces.append(face)
        return faces

    def embed(self, frame: np.ndarray, face: Face) -> np.ndarray:
        """Always FaceError: a cascade knows no identity."""
        raise FaceError("the cascade gives no embeddings; use an InsightFace pack")


def _covered(box: np.ndarray, other: np.ndarray) -> float:
    """Share of `box` that lies inside `other`."""
    low, high = np.maximum(box[:2], other[:2]), np.minimum(box[2:], other[2:])
    return float(np.prod(np.maximum(high - low, 0)) / np.prod(box[2:] - box[:2]))


def _largest_first(faces: list[Face]) -> list[Face]:
    return sorted(faces, key=lambda face: face.area, reverse=True)


def open_face_backend(choice: str = "auto", *, threads: int = 2) -> FaceBackend:
    """The backend for `auto`, `insightface`, `insightface:PACK` or `cascade`.

    `auto` takes the best pack that is present, else the cascade; `.reason` says which and why.
    Raises FaceError for an unknown choice or a pack that is not there.
    """
    kind, _, pack = choice.partition(":")
    if kind == "cascade" and not pack:
        return CascadeBackend()
    if kind == "auto" and not pack:
        folder = locate_face_pack()
        if folder is None:
            return CascadeBackend(reason="no InsightFace pack was found, so no identity is known")
        reason = f"the best of {len(face_packs())} InsightFace packs found: {folder}"
        return InsightFaceBackend(folder, threads=threads, reason=reason)
    if kind != "insightface":
        raise FaceError(
            f"face backend {choice!r}; expected auto, insightface, insightface:PACK or cascade"
        )
    folder = locate_face_pack(pack or None)
    if folder is None:
        present = ", ".join(path.name for path in face_packs()) or "none"
        raise FaceError(
            f"no InsightFace pack {pack or 'of any name'} was found (present: {present}); "
            f"put it in a folder face/PACK below {ENVIRONMENT}, or use the cascade"
        )
    return InsightFaceBackend(folder, threads=threads)
