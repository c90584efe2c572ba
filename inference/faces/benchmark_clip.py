"""What face optimisation is measured on: real faces in a decoder of the published structure.

Weights of the published decoder are not at hand everywhere, and random ones show no face. So a
small autoencoder of the same structure is fitted for a moment to the very clip that it is measured
on: its pictures are soft, but show faces that a recognition network knows.

Shapes: T frames, P people, H W pixels.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import (
    AutoencoderKLTemporalDecoder,
)
from torch import Tensor

from animator.latents import TemporalVAE
from inference.conditioning import to_tensor
from inference.faces.places import FacePlaces
from pipelines.faces import Face, FaceBackend
from pipelines.images import read_image
from pipelines.video import iter_frames

CHANNELS = (32, 32, 32, 32)
PATCH, PATCHES = 96, 4  # pixels of a square, squares of a step
RATE = 2e-3
_READ = 6  # frames read of the video for one that is used: the face must be found in it


@dataclass(frozen=True)
class FaceFrames:
    """Frames with faces of known places: all that a decoder is fitted to."""

    frames: np.ndarray  # (T, H, W, 3) uint8
    places: FacePlaces  # of (T, P) faces


@dataclass(frozen=True)
class FaceClip(FaceFrames):
    """Frames with a face of a known place, and a picture of another face."""

    reference: np.ndarray  # uint8
    reference_face: Face


def read_clip(
    video: Path,
    reference: Path,
    detector: FaceBackend,
    *,
    frames: int,
    size: tuple[int, int],
    face: int,
) -> FaceClip:
    """The first frames of a video that show a face, scaled so that it is `face` pixels high.

    Raises:
        ValueError: where there are too few, or no face in the reference.
    """
    picture = read_image(reference)
    others = detector.detect(picture)
    if not others:
        raise ValueError(f"{reference}: no face was found; give a picture with one.")
    scale, centre = 0.0, np.zeros(2)
    kept, landmarks, boxes = [], [], []
    for frame in islice(iter_frames(video), _READ * frames):
        found = [f for f in detector.detect(frame) if np.isfinite(f.landmarks).all()]
        if not found:
            continue
        extent = np.array(frame.shape[1::-1])
        if not kept:  # one scale and place for the clip, so that the face moves in it
            box = found[0].box.reshape(2, 2) * extent
            scale, centre = face / float((box[1] - box[0]).max()), box.mean(0)
        moved = np.array([[scale, 0, 0], [0, scale, 0]], np.float64)
        moved[:, 2] = np.array(size[::-1]) / 2 - scale * centre
        kept.append(
            cv2.warpAffine(
                frame, moved, size[::-1], flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REPLICATE
            )
        )

        def onto(points: np.ndarray, moved: np.ndarray = moved, extent: np.ndarray = extent):
            return (points * extent @ moved[:, :2].T + moved[:, 2]) / np.array(size[::-1])

        landmarks.append(onto(found[0].landmarks))
        boxes.append(onto(found[0].box.reshape(2, 2)).reshape(4))
        if len(kept) == frames:
            break
    if len(kept) < frames:
        raise ValueError(
            f"{video}: {len(kept)} frames with a face, but expected {frames}: give another clip."
        )
    places = FacePlaces(
        visible=np.ones((frames, 1), bool),
        landmarks=np.stack(landmarks)[:, None].astype(np.float32),
        boxes=np.stack(boxes)[:, None].astype(np.float32),
        size=size,
    )
    return FaceClip(np.stack(kept), places, picture, others[0])


def fitted_codec(
    clip: FaceFrames, folder: Path, *, steps: int, tell: Callable[[float], None]
) -> tuple[TemporalVAE, dict[str, float]]:
    """A small autoencoder that shows this clip, from the folder where it was fitted before.

    It is fitted around the visible faces, wherever they are; what is far from all of them comes
    out as it may.

    Returns:
        the codec and how it was fitted: steps, seconds, mean absolute error of patches (0..255).

    Raises:
        ValueError: for a clip that shows no face, or whose frames are smaller than a patch.
    """
    if not clip.places.visible.any():
        raise ValueError(
            "Got a clip without a visible face, but expected one at least: the decoder is fitted "
            "around faces. Give another clip."
        )
    if min(clip.frames.shape[1:3]) < PATCH:
        raise ValueError(
            f"Got frames of {clip.frames.shape[1]} x {clip.frames.shape[2]} pixels, but expected "
            f"at least {PATCH} x {PATCH}: the decoder is fitted to squares of that size."
        )
    place = folder / f"vae-{_key(clip, steps)}"
    if not (place / "fit.json").is_file():
        vae, about = _fit(clip, steps, tell)
        vae.save_pretrained(str(place))
        (place / "fit.json").write_text(json.dumps(about))
    return TemporalVAE.from_folder(place), json.loads((place / "fit.json").read_text())


def _key(clip: FaceFrames, steps: int) -> str:
    """What names a fit: everything that it depends on."""
    settings = [CHANNELS, PATCH, PATCHES, RATE, steps, clip.frames.shape, clip.places.visible.shape]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for part in (clip.frames, clip.places.visible, clip.places.boxes):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]


def _fit(
    clip: FaceFrames, steps: int, tell: Callable[[float], None]
) -> tuple[AutoencoderKLTemporalDecoder, dict[str, float]]:
    torch.manual_seed(0)
    sizes: Any = {"block_out_channels": CHANNELS, "layers_per_block": 1}
    kinds: Any = ("DownEncoderBlock2D",) * 4
    vae = AutoencoderKLTemporalDecoder(down_block_types=kinds, **sizes)
    adam = torch.optim.Adam(vae.parameters(), lr=RATE)
    rng = np.random.default_rng(0)
    begun, error = time.perf_counter(), 1.0
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = RATE * min(1, 5 * (1 - step / steps))
        patches = _patches(clip, rng)
        latents = vae.encode(patches, return_dict=False)[0].mode()
        shown = vae.decode(latents, num_frames=len(patches), return_dict=False)[0]
        off = (shown - patches).abs().mean()
        loss = off + 0.01 * (latents.square().mean() - 1).square()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        adam.step()
        error += 0.05 * (float(off.detach()) - error)
        tell((step + 1) / steps)
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        spread = vae.encode(_patches(clip, rng), return_dict=False)[0].mode().std()
    vae.register_to_config(scaling_factor=1 / float(spread))
    seconds = round(time.perf_counter() - begun, 1)
    return vae, {"steps": steps, "seconds": seconds, "error": round(error * 127.5, 2)}


def _patches(clip: FaceFrames, rng: np.random.Generator) -> Tensor:
    """The same square of consecutive frames `(PATCHES, 3, PATCH, PATCH)`, near a visible face.

    There are fewer frames where the clip has fewer.
    """
    frames, places = clip.frames, clip.places
    number, person = rng.choice(np.argwhere(places.visible))
    first = max(0, int(number) - PATCHES + 1)
    last = min(int(number), max(0, len(frames) - PATCHES))
    start = int(rng.integers(first, last + 1))
    x0, y0, x1, y1 = places.boxes[number, person]
    height, width = frames.shape[1:3]
    top, left = (
        int(np.clip(rng.normal(middle * side, PATCH / 2) - PATCH / 2, 0, side - PATCH))
        for middle, side in (((y0 + y1) / 2, height), ((x0 + x1) / 2, width))
    )
    part = frames[start : start + PATCHES, top : top + PATCH, left : left + PATCH]
    return to_tensor(np.ascontiguousarray(part))
