"""Pose alignment measured on misaligned poses whose truth is known, beside its baselines.

A clip of poses is misaligned by one random similarity. Each method gets one frame of the clip as
it was, the reference, and the other frames misaligned, and gives the transforms that shall undo
it. They are judged on the joints without the detector's noise.

Shapes: B clips, T driven frames, N = 18 joints; transforms have fields `(B, T)` and `(B, T, 2)`.
Points are isotropic, so that distances are in units of the longer side of the frame.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from animator.alignment import AlignmentBlock
from animator.alignment_weights import SHIPPED, open_alignment
from animator.keypoints import LEFT_RIGHT, misalignment
from animator.similarity import Similarity, apply, compose, identity, invert, rotate
from inference.affine import fit_affine
from inference.alignment.settings import (
    DEFAULT_SETTING,
    RECORDED,
    AlignmentSetting,
    named_settings,
)
from inference.clip_alignment import (
    AlignmentSettings,
    FrameAlignment,
    align_clip,
    align_frames,
    sum_frames,
)
from inference.timing import machine
from pipelines.draws import uniforms
from pipelines.motion import MotionStore
from pipelines.motion_camera import PoseClips, PoseSampler
from pipelines.pose_sequences import PoseSequences

OnStep = Callable[[int, int], None]  # (clips done, clips in all)
NUM_FRAMES = 48
MIN_SEEN = 6  # joints that a reference shows, where the clip has such a frame
_CHUNK = 32  # clips measured at once
_CHOICE, _MISALIGN = 100, 101  # streams of random numbers
_PERSON = 1 << 32  # between the seeds of people of one frame


class Misaligned(NamedTuple):
    """Clips with known misalignment."""

    reference: Tensor  # (B, N, 2), as a detector finds it
    driven: Tensor  # (B, T, N, 2), misaligned, as a detector finds it
    weight: Tensor  # (B, T, N), confidence that a joint is seen in both
    frame: Tensor  # (B, 2), height and width of the frame, of its longer side
    moved: Tensor  # (B, T, N, 2), misaligned, without noise
    truth: Tensor  # (B, T, N, 2), not misaligned, without noise
    counts: Tensor  # (B, T, N), whether the joint is in the frame and so is measured
    misalign: Similarity  # fields (B, 1) and (B, 1, 2)


Method = Callable[[Misaligned], Similarity]


@torch.no_grad()
def evaluate_alignment(
    motion: Path | None = None,
    *,
    poses: Path | None = None,
    clips: int = 300,
    seed: int = 0,
    alignment: str = SHIPPED,
    setting: str = DEFAULT_SETTING,
    num_frames: int = NUM_FRAMES,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """The table of baselines and, where there is a model, the learned alignment.

    Args:
        motion: a folder of motion capture; a sequence's chance goes with its length.
        poses: a folder of recorded 2-D poses instead (`pipelines.pose_sequences`), which are
            measured as they are, under the one setting `recorded`.
        clips: how many clips.
        alignment: the block to measure: a choice of `animator.alignment_weights`.
        setting: a name of `inference.alignment.settings`, or `all`.
        num_frames: driven frames of a clip, an even number: pairs of frames that follow each
            other, spread over the clip.

    Returns:
        `rows` (of the default setting where all are measured) and `settings`, whose every entry
        has rows of its own. A row: `dis` and `dis_p95`, mean and 95th percentile over clips of
        the mean distance to the poses as they were; `rotation` (degrees), `scale` (ratio - 1) and
        `shift` (of the frame's centre), mean errors of the transform; `jitter`, how far the same
        joints move where a frame's transform is changed for that of the video's next frame;
        `ms_per_frame`.

    Raises:
        ValueError: nothing to measure, or an unknown setting.
    """
    for name, value, least in (("clips", clips, 1), ("seed", seed, 0), ("frames", num_frames, 2)):
        if value < least:
            raise ValueError(f"{name} is {value}, expected at least {least}.")
    if num_frames % 2:
        raise ValueError(f"frames is {num_frames}, expected an even number.")
    source = _open(motion, poses)
    chosen = named_settings(setting) if motion is not None else {"recorded": RECORDED}
    block, about_block = open_alignment(alignment)
    methods = _methods(block)
    total = clips * len(chosen)
    measured = {}
    for number, (name, about) in enumerate(chosen.items()):
        rows = _Rows(methods)
        for done, batch in misaligned_clips(source, about, clips, seed, num_frames):
            rows.add(batch)
            if on_step is not None:
                on_step(number * clips + done, total)
        measured[name] = {"about": about.about, "rows": rows.result(), "drawn": asdict(about)}
    main = measured.get(DEFAULT_SETTING) or next(iter(measured.values()))
    return {
        "rows": main["rows"],
        "settings": measured,
        "alignment": about_block,
        "clips": clips,
        "frames": num_frames,
        "seed": seed,
        "data": {
            "folder": source.folder.name,
            "sequences": len(source),
            "fingerprint": source.fingerprint,
            "licences": dict(source.licences) if isinstance(source, MotionStore) else {},
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(torch.device("cpu")),
    }


def misaligned_clips(
    source: MotionStore | PoseSequences,
    setting: AlignmentSetting,
    clips: int,
    seed: int,
    num_frames: int,
) -> Iterator[tuple[int, Misaligned]]:
    """Clips in portions, with how many are done after each; people count as clips of their own."""
    draws: list[Callable[[range], PoseClips]]
    if isinstance(source, PoseSequences):
        draws = [lambda samples: source.draw(samples, num_frames + 2, seed)]
    else:
        samplers = [
            PoseSampler(source, camera, seed + _PERSON * i)
            for i, camera in enumerate(setting.cameras)
        ]
        draws = [partial(s.draw, num_frames=num_frames + 2, in_pairs=True) for s in samplers]
    for first in range(0, clips, _CHUNK):
        samples = range(first, min(first + _CHUNK, clips))
        chance = uniforms(seed, samples, num_frames // 2 + 1, _CHOICE)
        misalign = misalignment(uniforms(seed, samples, 4, _MISALIGN), setting.misalignment)
        people = [
            _misalign(
                draw(samples),
                chance,
                misalign,
                mirrored=setting.mirrored,
            )
            for draw in draws
        ]
        yield samples.stop, _joined(people)


def _open(motion: Path | None, poses: Path | None) -> MotionStore | PoseSequences:
    if (motion is None) == (poses is None):
        given = "neither" if motion is None else "both"
        raise ValueError(
            f"Got {given} of motion and poses, expected one folder: motion capture, or recorded "
            "2-D poses."
        )
    return MotionStore(motion) if motion is not None else PoseSequences(poses or "")


def _misalign(
    clips: PoseClips, chance: Tensor, misalign: Similarity, *, mirrored: bool
) -> Misaligned:
    """Take a frame of each clip as its reference, at random, and misalign the others.

    Frames come in pairs; the reference's neighbour is left out.
    """
    seen = (clips.score[:, ::2] > 0).sum(-1)
    pair = (seen.clamp_max(MIN_SEEN) + chance).argmax(1)
    batch = torch.arange(len(pair))
    reference, ref_score = clips.observed[batch, 2 * pair], clips.score[batch, 2 * pair]
    every = torch.arange(clips.score.shape[1])
    others = torch.stack([every[every // 2 != p] for p in pair])
    truth, found, score, inside = (field[batch[:, None], others] for field in clips[:4])
    if mirrored:
        middle = truth[..., 0].mean((1, 2), keepdim=True)
        truth, found = (_mirror(points[:, :, LEFT_RIGHT], middle) for points in (truth, found))
        score, inside = score[:, :, LEFT_RIGHT], inside[:, :, LEFT_RIGHT]
    misalign = Similarity(*(field[:, None] for field in misalign))
    return Misaligned(
        reference=reference,
        driven=apply(misalign, found),
        weight=torch.minimum(score, ref_score[:, None]),
        frame=clips.size,
        moved=apply(misalign, truth),
        truth=truth,
        counts=inside,
        misalign=misalign,
    )


def _joined(people: list[Misaligned]) -> Misaligned:
    tensors = (torch.cat(field) for field in zip(*(p[:-1] for p in people), strict=True))
    fields = (torch.cat(field) for field in zip(*(p.misalign for p in people), strict=True))
    return Misaligned._make([*tensors, Similarity._make(fields)])


def _mirror(points: Tensor, middle: Tensor) -> Tensor:
    return torch.stack([2 * middle - points[..., 0], points[..., 1]], -1)


def _methods(block: AlignmentBlock | None) -> dict[str, Method]:
    """Each row's method, in the order of the table."""
    methods: dict[str, Method] = {
        "none": lambda clips: identity(clips.weight.shape[:2], clips.driven),
        "affine": lambda clips: _for_all(fit_affine(clips.driven, clips.reference, clips.weight)),
        "similarity": lambda clips: _frames(None, clips).transform,
        "similarity_clip": lambda clips: _clip(_frames(None, clips), clips),
    }
    if block is not None:
        methods["learned"] = lambda clips: _frames(block, clips).transform
        methods["learned_clip"] = lambda clips: _clip(_frames(block, clips), clips)
    methods["oracle"] = _oracle
    methods["oracle_clip"] = lambda clips: _clip(
        _frames(None, clips)._replace(transform=_oracle(clips)), clips
    )
    return methods


def _frames(block: AlignmentBlock | None, clips: Misaligned) -> FrameAlignment:
    return align_frames(block, clips.reference, clips.driven, clips.weight, clips.frame)


def _clip(frames: FrameAlignment, clips: Misaligned) -> Similarity:
    sums = sum_frames(frames, clips.driven, clips.weight)
    return _for_all(align_clip(sums, AlignmentSettings()).transform)


def _oracle(clips: Misaligned) -> Similarity:
    """Knows rotation and scale; takes the place where the reference's common joints are."""
    right = invert(clips.misalign)
    weight = clips.weight[..., None]
    total = weight.sum(2).clamp_min(1e-6)
    mean_d = (clips.driven * weight).sum(2) / total
    mean_r = (clips.reference[:, None] * weight).sum(2) / total
    scale, cos, sin = (f.expand(clips.weight.shape[:2]) for f in right[:3])
    shift = mean_r - scale[..., None] * rotate(mean_d[..., None, :], cos, sin)[..., 0, :]
    return Similarity(scale, cos, sin, shift)


def _for_all(transform: Similarity) -> Similarity:
    """One transform a clip as the transform of all its frames."""
    return Similarity(*(field[:, None] for field in transform))


class _Rows:
    """Collects what each method's transforms are worth."""

    def __init__(self, methods: dict[str, Method]) -> None:
        self.methods = methods
        self.seconds = dict.fromkeys(methods, 0.0)
        self.frames = 0
        self.found: dict[str, list[dict[str, Tensor]]] = {name: [] for name in methods}

    def add(self, clips: Misaligned) -> None:
        self.frames += clips.weight[..., 0].numel()
        for name, method in self.methods.items():
            started = time.perf_counter()
            transform = method(clips)
            self.seconds[name] += time.perf_counter() - started
            self.found[name].append(_errors(transform, clips))

    def result(self) -> dict[str, dict[str, float]]:
        rows = {}
        for name, parts in self.found.items():
            row = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
            rows[name] = {
                "dis": _mean(row["dis"]),
                "dis_p95": float(row["dis"].nan_to_num(0).quantile(0.95)),
                **{key: _mean(row[key]) for key in ("rotation", "scale", "shift", "jitter")},
                "ms_per_frame": 1e3 * self.seconds[name] / self.frames,
            }
        return rows


def _errors(transform: Similarity, clips: Misaligned) -> dict[str, Tensor]:
    """Errors of each clip, `(B,)`; NaN where none of its joints is in the frame."""
    counts = clips.counts
    back = apply(transform, clips.moved)
    distance = (back - clips.truth).norm(dim=-1) * counts
    left = compose(transform, clips.misalign)  # what is left of the misalignment
    frames = counts.shape[:2]
    following = Similarity(*(f.expand(*frames, *f.shape[2:])[:, 1::2] for f in transform))
    first, counts_first = clips.moved[:, ::2], counts[:, ::2]
    step = (apply(following, first) - back[:, ::2]).norm(dim=-1) * counts_first
    return {
        "dis": distance.sum((1, 2)) / counts.sum((1, 2)),
        "rotation": left.degrees.abs().mean(1),
        "scale": (left.scale.abs().log().abs().exp() - 1).mean(1),
        "shift": left.shift.norm(dim=-1).mean(1),
        "jitter": step.sum((1, 2)) / counts_first.sum((1, 2)),
    }


def _mean(values: Tensor) -> float:
    return float(values[values.isfinite()].mean()) if values.isfinite().any() else math.nan
