"""People's keypoints from two ONNX networks: a YOLOX person detector and a top-down pose network.

Both kinds of heads are read: heat maps (TinyPose) and SimCC (DWPose), of the body's 17 points in
COCO's order or of COCO-WholeBody's 133. Where no person is detected there are no keypoints: the
pose network never sees a whole frame, on which it would dream up a skeleton.

N crops, K network keypoints (17 or 133), H W input size, h w heat-map size
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from animator.keypoints import BODY, VISIBLE
from pipelines.pose import (
    Person,
    PoseError,
    PoseTrack,
    calibrate,
    link_people,
    without_outside,
)
from pipelines.pose_duplicates import without_duplicates

PERSON_SCORE = 0.4
MIN_VISIBLE = 3
NMS_OVERLAP = 0.45
STRIDES = (8, 16, 32)
PAD_VALUE = 114
BOX_SCALE = 1.25
BATCH = 16
FRAMES_AT_ONCE = 16
MEAN = np.array([123.675, 116.28, 103.53], np.float32)
STD = np.array([58.395, 57.12, 57.375], np.float32)
COCO_BODY = 17
COCO_WHOLE_BODY = 133  # 17 of the body, 6 of the feet, 68 of the face, 21 of each hand
COCO_FACE, COCO_HANDS = slice(23, 91), slice(91, 133)  # the left hand first
LEFT_SHOULDER, RIGHT_SHOULDER = 5, 6
# COCO-17 index of each COCO-18 keypoint but the neck, which lies between the shoulders.
COCO18_FROM_COCO17 = [0, 5, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3]
NECK = 1
# Raw scores from which a joint is worth using. TinyPose's peaks reach 0.3 for joints that are
# hidden: on labelled photos 0.5 keeps 97 % of the visible joints and half of the occluded ones.
HEATMAP_THRESHOLD = 0.5
SIMCC_THRESHOLD = 0.3


def open_session(path: str | Path, threads: int) -> Any:
    """An ONNX Runtime session on the GPU where there is one; PoseError for a damaged file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    available = onnxruntime.get_available_providers()
    wanted = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in available]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=wanted)
    except Exception as error:  # ORT raises its own types, made at run time
        raise PoseError(f"{path}: not a usable ONNX model ({error}); fetch it again") from None


class PersonDetector:
    """YOLOX: boxes of people in a frame. The input size is read from the model."""

    def __init__(self, path: str | Path, *, threads: int = 2, min_score: float = PERSON_SCORE):
        self._session = open_session(path, threads)
        entry = self._session.get_inputs()[0]
        if len(entry.shape) != 4 or not all(isinstance(side, int) for side in entry.shape[2:]):
            raise PoseError(f"{path}: input {entry.shape}, expected a fixed (1, 3, H, W)")
        self._input, self._size = entry.name, tuple(entry.shape[2:])
        self._min_score = min_score
        self._grid, self._stride = _anchor_grid(self._size)
        self.providers = self._session.get_providers()

    def detect(self, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (P, 4) in pixels and scores (P,) of the people in an RGB frame, best first."""
        height, width = self._size
        ratio = min(height / frame.shape[0], width / frame.shape[1])
        small = cv2.resize(
            frame, (max(1, round(frame.shape[1] * ratio)), max(1, round(frame.shape[0] * ratio)))
        )[:height, :width]
        canvas = np.full((height, width, 3), PAD_VALUE, np.uint8)
        canvas[: small.shape[0], : small.shape[1]] = small[..., ::-1]
        tensor = np.ascontiguousarray(canvas.transpose(2, 0, 1)[None], dtype=np.float32)
        raw = self._session.run(None, {self._input: tensor})[0][0]
        score = raw[:, 4] * raw[:, 5]
        kept = score >= self._min_score
        raw, score = raw[kept], score[kept]
        centre = (raw[:, :2] + self._grid[kept]) * self._stride[kept]
        half = np.exp(raw[:, 2:4]) * self._stride[kept] / 2
        boxes = np.concatenate([centre - half, centre + half], 1) / ratio
        limits = np.array([frame.shape[1], frame.shape[0]] * 2, np.float32)
        boxes = np.clip(boxes, 0, limits).astype(np.float32)
        chosen = _suppress(boxes, score)
        return boxes[chosen], score[chosen]


def _anchor_grid(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    grids, strides = [], []
    for stride in STRIDES:
        rows, columns = size[0] // stride, size[1] // stride
        y, x = np.mgrid[:rows, :columns]
        grids.append(np.stack([x, y], -1).reshape(-1, 2))
        strides.append(np.full((rows * columns, 1), stride))
    return np.concatenate(grids).astype(np.float32), np.concatenate(strides).astype(np.float32)


def _suppress(boxes: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Indices of the boxes that are left when better ones take those they overlap."""
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    order = np.argsort(-score, kind="stable")
    order = order[area[order] > 0]
    kept = []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(best)
        low = np.maximum(boxes[best, :2], boxes[rest, :2])
        high = np.minimum(boxes[best, 2:], boxes[rest, 2:])
        shared = np.prod(np.maximum(high - low, 0), axis=1)
        order = rest[shared / (area[best] + area[rest] - shared) < NMS_OVERLAP]
    return np.array(kept, int)


class PoseNetwork:
    """A top-down network run over crops of people, as many at once as the model takes."""

    def __init__(self, path: str | Path, *, threads: int = 2):
        self._session = open_session(path, threads)
        entry = self._session.get_inputs()[0]
        if len(entry.shape) != 4 or not all(isinstance(side, int) for side in entry.shape[2:]):
            raise PoseError(f"{path}: input {entry.shape}, expected (N, 3, H, W) with fixed H, W")
        self._input, self._size = entry.name, tuple(entry.shape[2:])
        self._batch = entry.shape[0] if isinstance(entry.shape[0], int) else BATCH
        self._fixed_batch = isinstance(entry.shape[0], int)
        outputs = self._session.get_outputs()
        ranks = [len(output.shape) for output in outputs]
        if ranks == [4]:
            self.head = "heatmap"
        elif ranks == [3, 3]:
            self.head = "simcc"
        else:
            shapes = [output.shape for output in outputs]
            raise PoseError(
                f"{path}: outputs {shapes}, expected one (N, K, h, w) of heat maps or two "
                "(N, K, W·s), (N, K, H·s) of SimCC"
            )
        self.providers = self._session.get_providers()

    def estimate(
        self, crops: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """COCO keypoints (N, K, 2) in pixels of the frame and score (N, K) of (frame, box)."""
        points, scores = [], []
        for begin in range(0, len(crops), self._batch):
            part = crops[begin : begin + self._batch]
            regions = np.stack([crop_region(box, self._size) for _, box in part])
            tensor = np.stack(
                [
                    self._crop(frame, region)
                    for (frame, _), region in zip(part, regions, strict=True)
                ]
            )
            if self._fixed_batch and len(part) < self._batch:
                tensor = np.pad(tensor, [(0, self._batch - len(part)), (0, 0), (0, 0), (0, 0)])
            outputs = self._session.run(None, {self._input: tensor})
            place, score = self._decode([output[: len(part)] for output in outputs])
            # place is 0..1 of the region (x, y, width, height)
            points.append(regions[:, None, :2] + place * regions[:, None, 2:])
            scores.append(score)
        if not points:
            return np.zeros((0, COCO_BODY, 2), np.float32), np.zeros((0, COCO_BODY), np.float32)
        return np.concatenate(points), np.concatenate(scores)

    def _crop(self, frame: np.ndarray, region: np.ndarray) -> np.ndarray:
        height, width = self._size
        scale = width / region[2]
        matrix = np.array([[scale, 0, -region[0] * scale], [0, scale, -region[1] * scale]])
        crop = cv2.warpAffine(frame, matrix, (width, height), flags=cv2.INTER_LINEAR)
        return ((crop.astype(np.float32) - MEAN) / STD).transpose(2, 0, 1)

    def _decode(self, outputs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        # Whatever else a network adds to the body's points has an order of its own.
        if outputs[0].shape[1] != COCO_WHOLE_BODY:
            outputs = [output[:, :COCO_BODY] for output in outputs]
        if self.head == "heatmap":
            return decode_heatmaps(outputs[0])
        height, width = self._size
        along_x, along_y = outputs
        if along_x.shape[-1] * height != along_y.shape[-1] * width:
            along_x, along_y = along_y, along_x
        return decode_simcc(along_x, along_y)


def crop_region(box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(x, y, width, height) around a pixel box, a quarter larger, at the network's aspect."""
    height, width = size
    centre, extent = (box[:2] + box[2:]) / 2, np.maximum(box[2:] - box[:2], 1)
    aspect = width / height
    region_width = BOX_SCALE * max(extent[0], extent[1] * aspect)
    region = np.array([region_width, region_width / aspect])
    return np.concatenate([centre - region / 2, region])


def decode_heatmaps(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Peaks of heat maps (N, K, h, w) as xy (N, K, 2) in 0..1 and height (N, K).

    The peak is moved a quarter of a cell towards its higher neighbour.
    """
    count, joints, height, width = maps.shape
    flat = maps.reshape(count, joints, -1)
    peak = flat.argmax(-1)
    score = np.take_along_axis(flat, peak[..., None], -1)[..., 0].clip(0, 1)
    y, x = np.divmod(peak, width)
    padded = np.pad(maps, [(0, 0), (0, 0), (1, 1), (1, 1)], mode="edge")
    n, k = np.ogrid[:count, :joints]
    right, left = padded[n, k, y + 1, x + 2], padded[n, k, y + 1, x]
    below, above = padded[n, k, y + 2, x + 1], padded[n, k, y, x + 1]
    place = np.stack([x + 0.25 * np.sign(right - left), y + 0.25 * np.sign(below - above)], -1)
    return place / np.array([width, height]), score


def decode_simcc(along_x: np.ndarray, along_y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Peaks of SimCC vectors (N, K, W·s), (N, K, H·s) as xy (N, K, 2) in 0..1, score (N, K)."""
    place = np.stack(
        [along_x.argmax(-1) / along_x.shape[-1], along_y.argmax(-1) / along_y.shape[-1]], -1
    )
    return place, np.minimum(along_x.max(-1), along_y.max(-1)).clip(0, 1)


def coco18(keypoints: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """COCO-18 from COCO's points, the body's 17 first: the neck is the middle of the shoulders."""
    points, scores = keypoints[:, COCO18_FROM_COCO17].copy(), score[:, COCO18_FROM_COCO17].copy()
    shoulders = [LEFT_SHOULDER, RIGHT_SHOULDER]
    points[:, NECK] = keypoints[:, shoulders].mean(1)
    scores[:, NECK] = score[:, shoulders].min(1)
    return points, scores


def from_coco(keypoints: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Our keypoints: 18 from COCO's (N, 17, 2), 128 from COCO-WholeBody's (N, 133, 2).

    The feet are left out.
    """
    points, scores = coco18(keypoints, score)
    if score.shape[1] != COCO_WHOLE_BODY:
        return points, scores
    parts = COCO_HANDS, COCO_FACE
    return (
        np.concatenate([points, *(keypoints[:, part] for part in parts)], 1),
        np.concatenate([scores, *(score[:, part] for part in parts)], 1),
    )


class OnnxPoseBackend:
    """Person detector, pose network and linking."""

    def __init__(
        self,
        detector_path: str | Path,
        pose_path: str | Path,
        *,
        licence: str = "unknown",
        threads: int = 2,
        reason: str = "",
    ):
        self._detector = PersonDetector(detector_path, threads=threads)
        self._network = PoseNetwork(pose_path, threads=threads)
        self.name = f"onnx:{Path(detector_path).stem}+{Path(pose_path).stem}"
        self.licence = licence
        self.reason = reason or f"asked for {pose_path}"
        self.providers = self._network.providers
        self.threshold = VISIBLE
        simcc = self._network.head == "simcc"
        self.raw_threshold = SIMCC_THRESHOLD if simcc else HEATMAP_THRESHOLD

    def detect(self, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (P, 4) in 0..1 and scores (P,) of the people in one RGB frame, best first."""
        boxes, score = self._detector.detect(frame)
        return boxes / np.array([frame.shape[1], frame.shape[0]] * 2, np.float32), score

    def people(self, frames: Sequence[np.ndarray]) -> list[list[Person]]:
        """The people of each frame, each once; crops of all frames go to the network together."""
        found = [self._detector.detect(frame)[0] for frame in frames]
        crops = [(frame, box) for frame, boxes in zip(frames, found, strict=True) for box in boxes]
        keypoints, score = from_coco(*self._network.estimate(crops))
        people: list[list[Person]] = [[] for _ in frames]
        owners: Iterable[int] = (i for i, boxes in enumerate(found) for _ in boxes)
        for number, owner in enumerate(owners):
            frame, box = crops[number]
            size = np.array([frame.shape[1], frame.shape[0]], np.float32)
            calibrated = calibrate(score[number], self.raw_threshold)
            points, scores = without_outside(keypoints[number] / size, calibrated)
            if (scores[BODY] >= VISIBLE).sum() >= MIN_VISIBLE:
                normal = (box / np.tile(size, 2)).astype(np.float32)
                people[owner].append(Person(keypoints=points, score=scores, box=normal))
        return [
            without_duplicates(found_here, (frame.shape[1], frame.shape[0]))
            for frame, found_here in zip(frames, people, strict=True)
        ]

    def track(
        self,
        frames: Sequence[np.ndarray],
        *,
        source: Path | None = None,
        times: np.ndarray | None = None,
        rate: float | None = None,
    ) -> PoseTrack:
        """People over the frames of one clip; nothing else is needed."""
        people: list[list[Person]] = []
        for begin in range(0, len(frames), FRAMES_AT_ONCE):
            people += self.people(frames[begin : begin + FRAMES_AT_ONCE])
        return link_people(people, backend=self.name)
