"""Self-driven reconstruction: a clip's held-out end, animated from one of its training frames.

Three baselines stand beside the model: the reference repeated, the best single training frame
chosen in hindsight, and for each frame the training frame nearest to it in hindsight.
Shapes: T held-out frames, H W the model's size.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from inference.metrics import compare, cut, person_boxes, psnr
from inference.pipeline import AnimationPipeline, OnStep, Pose
from pipelines.clips import ClipStore
from pipelines.faces import Face
from pipelines.framing import fit
from pipelines.shards import write_atomic
from pipelines.video import encode


@dataclass(frozen=True)
class HeldOut:
    """One clip at the model's size, cut into what was trained on and what was not."""

    trained: np.ndarray  # (S, H, W, 3)
    truth: np.ndarray  # (T, H, W, 3)
    boxes: np.ndarray  # (T, 4), the person in 0..1
    pose: Pose  # of the held-out frames
    face: Face | None  # of the reference
    fps: float


def held_out(
    clips: ClipStore,
    index: int,
    size: tuple[int, int],
    *,
    tail: float,
    reference: int = 0,
    framing: str = "pad",
) -> HeldOut:
    """The last `tail` of a clip's frames, and what came before.

    Raises:
        ValueError: for a share that leaves no frame on one side, or a reference outside of what
            was trained on.
    """
    num_frames = clips.num_frames(index)
    first = num_frames - int(num_frames * tail)
    if not 0 < tail < 1 or not 0 < first < num_frames:
        raise ValueError(
            f"Got holdout_tail {tail} for a clip of {num_frames} frames, but expected a share "
            "that leaves frames to train on and frames to measure."
        )
    if not 0 <= reference < first:
        raise ValueError(f"Got reference frame {reference}, but expected 0 to {first - 1}.")
    frame = fit(clips.size(index), size, framing)
    every = np.concatenate(
        [
            np.stack([frame.image(f) for f in clips.frames(index, list(part))])
            for part in np.array_split(np.arange(num_frames), max(1, num_frames // 64))
        ]
    )
    track, faces = clips.pose(index), clips.faces(index)
    threshold = float(clips.meta(index).get("pose", {}).get("threshold", 0.3))
    keypoints = frame.points(track.keypoints)
    face = None
    if faces.boxes.shape[1] and faces.boxes[reference, 0].any():
        face = Face(
            box=frame.boxes(faces.boxes[reference, 0]),
            score=float(faces.score[reference, 0]),
            landmarks=frame.points(faces.landmarks[reference, 0]),
        )
    return HeldOut(
        trained=every[:first],
        truth=every[first:],
        boxes=person_boxes(keypoints[first:, 0], track.score[first:, 0], threshold),
        pose=Pose(keypoints[first:], track.score[first:], size, threshold),
        face=face,
        fps=clips.fps(index),
    )


def evaluate_animator(
    model: Path,
    shards: Path,
    *,
    tail: float = 0.2,
    clip: int = 0,
    reference: int = 0,
    seed: int = 0,
    steps: int | None = None,
    out: Path | None = None,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Animate the held-out frames by their own poses and compare with the truth.

    Poses are used as they are: reference and driving clip are the same video.

    Args:
        out: a folder for `animation.mp4` (generated beside truth) and `frames.png`.

    Returns:
        `rows`: metrics of the model and of each baseline; `gain`: dB in the person's box over
        each baseline.
    """
    pipeline = AnimationPipeline.from_pretrained(model)
    config = pipeline.config
    clips = ClipStore(shards)
    data = held_out(clips, clip, (config.height, config.width), tail=tail, reference=reference)
    picture = data.trained[reference]
    result = pipeline(
        picture,
        Pose(data.pose.keypoints[0, 0], data.pose.score[0, 0], data.pose.size, data.pose.threshold),
        data.pose,
        fps=data.fps,
        face=data.face,
        align=False,
        seed=seed,
        settings=pipeline.settings.with_choices(steps=steps),
        on_step=on_step,
    )
    best, nearest = hindsight(data)
    rows = {
        "animator": compare(result.frames, data.truth, data.boxes),
        "repeat_reference": compare(_repeat(picture, data), data.truth, data.boxes),
        "best_training_frame": compare(_repeat(data.trained[best], data), data.truth, data.boxes),
        "nearest_training_frames": compare(data.trained[nearest], data.truth, data.boxes),
    }
    own = rows["animator"]["psnr_person"]
    if out is not None:
        _pictures(out, result.frames, result.pose_frames, data)
    return {
        "clip": clips.keys[clip],
        "frames_trained": len(data.trained),
        "frames_held_out": len(data.truth),
        "size": [config.height, config.width],
        "steps": result.settings.sampling.steps,
        "seed": seed,
        "rows": {name: {k: round(v, 3) for k, v in row.items()} for name, row in rows.items()},
        "gain": {
            name: round(own - row["psnr_person"], 3)
            for name, row in rows.items()
            if name != "animator"
        },
    }


def _repeat(frame: np.ndarray, data: HeldOut) -> np.ndarray:
    return np.repeat(frame[None], len(data.truth), axis=0)


def hindsight(data: HeldOut) -> tuple[int, np.ndarray]:
    """Training frame of the highest mean PSNR over all held-out frames, and of each of them."""
    table = np.array(
        [
            [psnr(cut(frame, box), cut(truth, box)) for frame in data.trained]
            for truth, box in zip(data.truth, data.boxes, strict=True)
        ]
    )
    return int(table.mean(0).argmax()), table.argmax(1)


def _pictures(out: Path, frames: np.ndarray, poses: np.ndarray, data: HeldOut) -> None:
    out.mkdir(parents=True, exist_ok=True)
    beside = np.concatenate([frames, data.truth], axis=2)
    encode(out / "animation.mp4", beside, fps=data.fps)
    columns = np.linspace(0, len(frames) - 1, 8).round().astype(int)
    sheet = np.concatenate(
        [np.concatenate(list(row[columns]), axis=1) for row in (poses, frames, data.truth)]
    )
    large = cv2.resize(sheet, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    done, png = cv2.imencode(".png", large[..., ::-1])
    if done:
        write_atomic(out / "frames.png", png.tobytes())
