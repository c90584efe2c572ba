"""The animator on held-out frames: denoising loss, sampled clips beside the truth, pictures.

Shapes: T frames, H W pixels.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from animator.model import Animator
from inference.metrics import compare, person_boxes
from inference.perception import Pose
from inference.pipeline import AnimationPipeline
from inference.settings import AnimationSettings
from pipelines.faces import Face
from pipelines.shards import write_atomic
from pipelines.video_encode import encode
from training.animate import AnimateTask
from training.animate_config import AnimateConfig
from training.animate_examples import AnimateExamples, Window, trained_frames
from training.frames import open_clips
from training.task import sample_generator, stack

_SEED = 0  # of noise and sampling: checkpoints and runs are compared on the same draws
_DRAWS = 4096  # that the noise levels are the quantiles of
_ROWS, _HEIGHT = 3, 256  # frames of a clip on the sheet, and pixels of one


class Sampled(NamedTuple):
    """What the model made of a held-out window; frames are uint8 `(T, H, W, 3)`."""

    reference: np.ndarray  # (H, W, 3)
    poses: np.ndarray
    frames: np.ndarray
    truth: np.ndarray

    def beside(self) -> np.ndarray:
        """Reference, pose, generated and true frame from left to right, `(T, H, 4 W, 3)`."""
        still = np.repeat(self.reference[None], len(self.truth), axis=0)
        return np.concatenate([still, self.poses, self.frames, self.truth], axis=2)


def validate(
    task: AnimateTask, model: nn.Module, folder: Path, device: torch.device, clips: int
) -> dict[str, float]:
    """Metrics of a model on frames that are never trained on; none where nothing is held out.

    `loss`, `loss_face` and `loss_sigma_q0..3` are the denoising loss at the medians of the four
    quarters of the noise levels drawn in training; faces weigh as in eq. 25 also where a run
    trains without that, so that runs can be compared. PSNR and SSIM, in the person's box and over
    the frame, are of clips sampled from noise, driven by their own poses, and `psnr_person_repeat`
    is what the reference repeated would score. `folder` gets a video a clip and `contact.png`, both
    reference | driving pose | generated | truth.

    Raises:
        ValueError: no held-out clip can be read.
    """
    examples = held_out_examples(task)
    if examples is None:
        return {}
    assert isinstance(model, Animator)
    folder.mkdir(parents=True, exist_ok=True)
    measure = AnimateTask(dataclasses.replace(examples.config, face_mask=True), examples)
    measure.prepare(device)
    training = model.training
    model.to(device).eval()
    rows: list[dict[str, float]] = []
    sheet: list[np.ndarray] = []
    with torch.no_grad(), _tensor_cores(device):
        for window in held_out_windows(examples, clips):
            losses = _losses(measure, model, window, device)
            sampled, metrics = _sample(task.config, model, examples, window)
            rows.append(losses | metrics)
            key = examples.clips.keys[window.index]
            beside = sampled.beside()
            encode(folder / f"{key}.mp4", beside, fps=examples.clips.fps(window.index))
            sheet += [_small(beside[i]) for i in _spread(len(beside))]
    model.train(training)
    if not rows:
        reasons = "; ".join(": ".join(problem) for problem in examples.problems())
        raise ValueError(
            f"No held-out clip of {examples.clips.root} can be used "
            f"({reasons or 'all are too short'}): give others with task.validation, or hold out "
            "more with task.holdout_tail."
        )
    _write_sheet(folder / "contact.png", sheet)
    return {name: _mean([row[name] for row in rows]) for name in rows[0]}


def held_out_examples(task: AnimateTask) -> AnimateExamples | None:
    """Clips that are not trained on, whole or in part, from pixels; None where there are none."""
    config = task.config
    plain = dataclasses.replace(config, latents="", pose_augmentation="none")
    if config.validation:
        plain = dataclasses.replace(plain, shards=config.validation, holdout_tail=0.0)
        clips = open_clips(config.validation)
    elif config.holdout_tail > 0:
        clips = task.examples.clips
    else:
        return None
    return AnimateExamples(plain, clips, _SEED, encoder=task.encoder)


def held_out_windows(examples: AnimateExamples, clips: int) -> Iterator[Window]:
    """Windows of clips spread over the store, each with the clip's first frame as reference.

    They begin where the held-out part does, or, of clips that are held out whole, lie as late as
    they can. A clip that cannot be read or has no held-out frame gives way to the next.
    """
    config, store = examples.config, examples.clips
    count, found = config.animator.num_frames, 0
    used: set[int] = set()
    wanted = min(clips, len(store))
    starts = np.linspace(0, len(store), wanted, endpoint=False).astype(int).tolist()
    for start in starts:
        for index in (*range(start, len(store)), *range(start)):
            if index in used:
                continue
            used.add(index)
            length = store.num_frames(index)
            first = trained_frames(length, config.holdout_tail)
            first = first if first < length else 0
            if config.holdout_tail > 0 and first == 0:
                continue
            stride = min(config.frame_strides[0], max(1, (length - first - 1) // max(1, count - 1)))
            if config.holdout_tail == 0:
                first = max(0, length - 1 - (count - 1) * stride)
            chosen = np.minimum(first + np.arange(count) * stride, length - 1)
            window = Window(index, chosen, 0, stride)
            if examples.readable(window):
                found += 1
                yield window
                break
        if found >= wanted:
            return


def fixed_sigmas(config: AnimateConfig) -> Tensor:
    """The medians of the four quarters of the noise levels drawn in training, `(4,)`."""
    generator = torch.Generator().manual_seed(_SEED)
    draws = torch.cat([config.draw_sigma(generator) for _ in range(_DRAWS)]).sort().values
    return draws[_DRAWS // 8 :: _DRAWS // 4].contiguous()


def _losses(
    task: AnimateTask, model: Animator, window: Window, device: torch.device
) -> dict[str, float]:
    examples = task.examples
    generator = sample_generator(_SEED, window.index)
    kept = ("keep_image_token", "keep_reference", "keep_face", "keep_pose")
    example = {
        **examples.inputs(window),
        "poses": torch.from_numpy(examples.poses(window)),
        "reference_noise": examples.reference_noise(window, generator),
        "noise": examples.noise(window, generator),
        "replaced": torch.tensor(0.0),
        **{name: torch.tensor(1.0) for name in kept},
    }
    batch = {name: value.to(device) for name, value in stack([example]).items()}
    found: dict[str, float] = {}
    faces = []
    for quarter, sigma in enumerate(fixed_sigmas(task.config)):
        loss, numbers = task.loss(model, {**batch, "sigma": sigma.reshape(1).to(device)})
        found[f"loss_sigma_q{quarter}"] = float(loss)
        faces.append(float(numbers["loss_face"]))
    return {"loss": _mean(list(found.values())), "loss_face": _mean(faces), **found}


def _sample(
    config: AnimateConfig, model: Animator, examples: AnimateExamples, window: Window
) -> tuple[Sampled, dict[str, float]]:
    index, chosen, reference, stride = window
    clip, size = examples.framed.clip(index), examples.framed.size_of(index)
    shown = examples.framed.pictures(index, chosen, reference)
    pipeline = AnimationPipeline(
        model, examples.encoder, None, AnimationSettings(sampling=config.sampling)
    )
    driving = Pose(clip.keypoints[chosen], clip.score[chosen], size, clip.threshold)
    result = pipeline(
        shown.reference,
        Pose(clip.keypoints[reference], clip.score[reference], size, clip.threshold),
        driving,
        fps=examples.clips.fps(index) / stride,
        face=_face(examples, window),
        align=False,
        size=size,
        seed=_SEED,
    )
    boxes = person_boxes(clip.keypoints[chosen, 0], clip.score[chosen, 0], clip.threshold)
    repeated = np.repeat(shown.reference[None], len(chosen), axis=0)
    metrics = compare(result.frames, shown.frames, boxes)
    metrics["psnr_person_repeat"] = compare(repeated, shown.frames, boxes)["psnr_person"]
    return Sampled(shown.reference, result.pose_frames, result.frames, shown.frames), metrics


def _face(examples: AnimateExamples, window: Window) -> Face | None:
    """The largest face of the reference frame at the training size."""
    clip, frame = examples.framed.clip(window.index), window.reference
    boxes = clip.face_boxes[frame]
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1) if len(boxes) else np.zeros(0)
    if not len(areas) or areas.max() <= 0:
        return None
    largest = int(areas.argmax())
    return Face(
        box=boxes[largest],
        landmarks=clip.landmarks[frame, largest],
        score=float(clip.face_score[frame, largest]),
    )


@contextmanager
def _tensor_cores(device: torch.device) -> Iterator[None]:
    """Products of fp32 matrices in TF32 on a GPU, which is several times as fast."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _spread(count: int) -> Sequence[int]:
    return np.unique(np.linspace(0, count - 1, min(_ROWS, count)).round().astype(int)).tolist()


def _small(frame: np.ndarray) -> np.ndarray:
    width = max(1, round(frame.shape[1] * _HEIGHT / frame.shape[0]))
    return cv2.resize(frame, (width, _HEIGHT), interpolation=cv2.INTER_AREA)


def _write_sheet(path: Path, rows: Sequence[np.ndarray]) -> None:
    """Rows of pictures below each other; those of narrower clips end in black."""
    widest = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 0), (0, widest - row.shape[1]), (0, 0))) for row in rows]
    done, png = cv2.imencode(".png", np.concatenate(padded)[..., ::-1])
    if done:
        write_atomic(path, png.tobytes())


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
