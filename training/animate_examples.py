"""Training examples of the animator: pure functions of sample numbers.

Shapes: T frames, P people, K keypoints, H W pixels, C latent channels, h w latent size.
"""

import itertools
import math
import threading
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from inference.conditioning import ReferenceEncoder, face_mask, to_tensor
from pipelines.clips import ClipStore
from pipelines.faces import Face
from pipelines.order import BucketOrder
from training.animate_config import AnimateConfig
from training.cached_latents import CachedLatents
from training.clip_sizes import Size, clip_sizes
from training.frames import FramedClips, open_clips
from training.pose_augmentation import NUMBERS, PoseAugmenter
from training.task import TrainingError, sample_generator

STAND_INS = 8  # clips tried in place of one that cannot be read


class Window(NamedTuple):
    """What of a clip an example is of."""

    index: int  # of the clip
    chosen: np.ndarray  # (T,), numbers of the frames
    reference: int  # number of the reference frame
    stride: int


def open_examples(config: AnimateConfig, seed: int, global_batch: int = 1) -> "AnimateExamples":
    """The examples of a run.

    Raises:
        ValueError: there are no clips, or the latents are not theirs.
    """
    clips = open_clips(config.shards)
    cached = None
    if config.latents:
        cached = CachedLatents(config.latents, clips, config.animator, config.framing)
    return AnimateExamples(config, clips, seed, global_batch, cached)


def trained_frames(num_frames: int, holdout_tail: float) -> int:
    """How many frames from a clip's start are trained on; the rest are held out."""
    return num_frames - math.floor(num_frames * holdout_tail)


class AnimateExamples:
    """Draws windows of clips with a reference frame. Safe to share by threads.

    Args:
        global_batch: samples of a step; they share one size.
        cached: latents of the clips, where they have been encoded.
        encoder: one that is open already.

    Attributes:
        needs_encoder: whether examples or the loss need the frozen encoders.
    """

    def __init__(
        self,
        config: AnimateConfig,
        clips: ClipStore,
        seed: int,
        global_batch: int = 1,
        cached: CachedLatents | None = None,
        encoder: ReferenceEncoder | None = None,
    ) -> None:
        self.config = config
        self.clips = clips
        self.seed = seed
        self.cached = cached
        model = config.animator
        own = (model.height, model.width)
        sizes = clip_sizes(config, clips, cached)
        self.buckets: dict[Size, list[int]] = {}
        for index, size in enumerate(sizes):
            self.buckets.setdefault(size, []).append(index)
        self.order = BucketOrder(list(self.buckets.values()), seed, global_batch)
        mode = config.framing if cached is None else cached.mode
        self.framed = FramedClips(clips, own, mode, style=model.pose_style, sizes=sizes)
        self._stored_faces = cached is not None and cached.has_faces
        self.needs_encoder = cached is None or not (cached.has_tokens and cached.has_faces)
        self._encoder = encoder
        if self.needs_encoder:
            _ = self.encoder  # what is missing shows before workers start
        self._augment = PoseAugmenter(config)
        self._problems: deque[tuple[str, str]] = deque()
        self._named: set[str] = set()
        self._lock = threading.Lock()

    @property
    def encoder(self) -> ReferenceEncoder:
        """The frozen encoders, opened where first needed."""
        if self._encoder is None:
            start = self.config.start
            folder = Path(start) if start else None
            self._encoder = ReferenceEncoder(self.config.animator, folder)
        return self._encoder

    @property
    def _wants_native(self) -> bool:
        return self.encoder.token_takes_native or self.encoder.needs_full_frames

    def encoder_models(self) -> dict[str, dict[str, str]]:
        """Name and licence of each encoder that the examples were made with."""
        if self.cached is None or self.needs_encoder:
            return self.encoder.models
        return {
            part: {"name": str(about["name"]), "licence": str(about["licence"])}
            for part, about in self.cached.store.models.items()
        }

    def problems(self) -> list[tuple[str, str]]:
        """Key and reason of the clips that could not be read since the last call."""
        return [self._problems.popleft() for _ in range(len(self._problems))]

    def example(self, sample: int) -> dict[str, Tensor]:
        """The tensors of one sample.

        Where its clip cannot be read another of the same size stands in.

        Raises:
            TrainingError: those cannot be read either.
        """
        reasons: list[str] = []
        clips = itertools.chain([self.order.clip(sample)], self.order.others(sample))
        for index in itertools.islice(clips, 1 + STAND_INS):
            try:
                drawn = self._drawn(sample, index)
            except (ValueError, OSError) as error:
                reasons.append(f"{self.clips.keys[index]} ({error})")
                self._name(self.clips.keys[index], f"{type(error).__name__}: {error}")
            else:
                return {**drawn, "replaced": torch.tensor(float(bool(reasons)))}
        raise TrainingError(
            f"Sample {sample} cannot be made: its clip and {len(reasons) - 1} others in its place "
            f"cannot be read: {'; '.join(reasons)}. Run `animator shards verify {self.clips.root}`."
        )

    def choose(self, index: int, generator: torch.Generator) -> Window:
        """Frames, and a reference frame from outside their span where there is one."""
        usable = trained_frames(self.clips.num_frames(index), self.config.holdout_tail)
        count = self.config.animator.num_frames
        # A clip that is too short for a stride gets the longest that fits, or holds its last frame.
        longest = max(1, (usable - 1) // max(1, count - 1))
        drawn = self.config.frame_strides[_below(len(self.config.frame_strides), generator)]
        stride = min(drawn, longest)
        span = (count - 1) * stride + 1
        start = _below(max(1, usable - span + 1), generator)
        chosen = np.minimum(start + np.arange(count) * stride, usable - 1)
        covered = int(chosen[-1]) - start + 1
        if covered >= usable:
            return Window(index, chosen, _below(usable, generator), stride)
        pick = _below(usable - covered, generator)
        reference = pick if pick < start else pick + covered
        return Window(index, chosen, reference, stride)

    def readable(self, window: Window) -> bool:
        """Whether what a window shows can be read; the clip is named where not."""
        try:
            self.inputs(window)
        except (ValueError, OSError) as error:
            self._name(self.clips.keys[window.index], f"{type(error).__name__}: {error}")
            return False
        return True

    def inputs(self, window: Window) -> dict[str, Tensor]:
        """What a window shows, without anything random and without poses."""
        index, chosen, reference, stride = window
        clip, size = self.framed.clip(index), self.framed.size_of(index)
        cell = self.config.animator.spatial_factor
        found = {
            "face_mask": torch.from_numpy(face_mask(clip.face_boxes[chosen], size, cell)),
            "fps": torch.tensor(self.clips.fps(index) / stride),
        }
        if self.cached is None:
            shown = self.framed.pictures(index, chosen, reference, native=self._wants_native)
            return found | {
                "frames": torch.from_numpy(shown.frames),
                "reference": torch.from_numpy(shown.reference),
                "token_image": self._token_image(shown.reference, shown.native),
                "face_embedding": self._embedding(window, shown.reference, shown.native),
            }
        latents = self.cached.latents(index, chosen, reference, clip.framing)
        found |= {"latents": latents.frames, "reference_latents": latents.reference}
        framed = own = None
        if self.needs_encoder:  # of the reference alone
            shown = self.framed.pictures(index, chosen[:0], reference, native=self._wants_native)
            framed, own = shown.reference, shown.native
        if self.cached.has_tokens:
            found["image_token"] = self.cached.token(index, reference)
        else:
            found["token_image"] = self._token_image(framed, own)
        return found | {"face_embedding": self._embedding(window, framed, own)}

    def noise(self, window: Window, generator: torch.Generator) -> Tensor:
        """Noise in the shape of the window's latents, `(T, C, h, w)`."""
        model, (height, width) = self.config.animator, self.framed.size_of(window.index)
        grid = (height // model.spatial_factor, width // model.spatial_factor)
        return torch.randn((len(window.chosen), model.latent_channels, *grid), generator=generator)

    def reference_noise(self, window: Window, generator: torch.Generator) -> Tensor:
        """Noise in the shape of the reference frame, `(3, H, W)`."""
        return torch.randn(3, *self.framed.size_of(window.index), generator=generator)

    def _drawn(self, sample: int, index: int) -> dict[str, Tensor]:
        config = self.config
        generator = sample_generator(self.seed, sample)
        # In this order ever since; what is new is drawn last, so that nothing else changes.
        window = self.choose(index, generator)
        dropped = torch.rand(2, generator=generator)
        # Drawn also where latents leave it unused, so that what follows is the same.
        reference_noise = self.reference_noise(window, generator)
        sigma = config.draw_sigma(generator)[0]
        noise = self.noise(window, generator)
        dropped_too = torch.rand(2, generator=generator)
        uniform = torch.rand(NUMBERS, generator=generator)
        clip, size = self.framed.clip(index), self.framed.size_of(index)
        moved = self._augment(clip, size, window.chosen, window.reference, uniform)
        found = self.inputs(window)
        if self.cached is None:
            found["reference_noise"] = reference_noise
        return found | {
            "poses": torch.from_numpy(self.poses(window, moved)),
            "sigma": sigma,
            "noise": noise,
            "keep_image_token": (dropped[0] >= config.drop_image_token).float(),
            "keep_reference": (dropped[1] >= config.drop_reference).float(),
            "keep_face": (dropped_too[0] >= config.drop_face).float(),
            "keep_pose": (dropped_too[1] >= config.drop_pose).float(),
        }

    def poses(self, window: Window, moved: np.ndarray | None = None) -> np.ndarray:
        """The window's drawn poses `(T, H, W, 3)`, or others `(T, P, K, 2)` in their place."""
        if moved is None:
            return self.framed.poses(window.index, window.chosen)
        return self.framed.draw(window.index, moved, window.chosen)

    def _token_image(self, framed: np.ndarray | None, native: np.ndarray | None) -> Tensor:
        """The reference as the image encoder takes it, `(3, H, W)` in [-1, 1]."""
        picture = native if self.encoder.token_takes_native else framed
        assert picture is not None
        return self.encoder.resize_for_token(to_tensor(picture)[None])[0]

    def _embedding(
        self, window: Window, framed: np.ndarray | None, native: np.ndarray | None
    ) -> Tensor:
        """The embedding `(E,)` of the largest face of the reference frame, or zeros."""
        clip, frame = self.framed.clip(window.index), window.reference
        stored = self._stored_faces
        full = stored or self.encoder.needs_full_frames
        boxes = (clip.source_boxes if full else clip.face_boxes)[frame]
        marks = (clip.source_landmarks if full else clip.landmarks)[frame]
        areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1) if len(boxes) else np.zeros(0)
        if not len(areas) or areas.max() <= 0:
            return torch.zeros(self.config.animator.face_embedding_dim)
        largest = int(areas.argmax())
        if stored:
            assert self.cached is not None
            return self.cached.face(window.index, frame, largest)
        score = float(clip.face_score[frame, largest]) if full else 1.0
        image = native if full else framed
        assert image is not None
        face = Face(box=boxes[largest], landmarks=marks[largest], score=score)
        return self.encoder.face_embedding(image, face)

    def _name(self, key: str, reason: str) -> None:
        with self._lock:
            if key not in self._named:
                self._named.add(key)
                self._problems.append((key, reason))


def _below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (1,), generator=generator))
