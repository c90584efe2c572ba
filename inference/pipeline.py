"""The animation pipeline: a saved model as one callable, in the manner of a diffusers pipeline.

Shapes: T frames, P people, N = 18 keypoints, H W output size, C latent channels.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from animator.alignment import AlignmentBlock
from animator.alignment_weights import AUTO, open_alignment
from animator.model import Animator
from animator.precision import weights_dtype
from animator.weights import read_config
from inference.clip_conditions import faceless_people, faces_of, moved, regions_of
from inference.clip_stream import AnimationResult, AnimationStream
from inference.conditioning import (
    EncodedReference,
    ReferenceEncoder,
    encode_reference,
    reference_key,
)
from inference.faces.setup import open_face_optimizer
from inference.guidance import Conditions, GuidedDenoiser
from inference.noise import ClipNoise
from inference.parallel import WindowedDenoiser, replicas
from inference.perception import Pose
from inference.pose_features import PoseFeatures, PoseImages
from inference.retarget import Retargeted, matched, retarget, unaligned
from inference.sampler import PORTION, Refiner, sample
from inference.settings import AnimationSettings, settings_of
from inference.speed import SpeedConfig, prepare
from inference.stages import Timings
from inference.states import ClipStates, WorkPlace, open_states
from inference.windows import Window, plan_windows
from pipelines.faces import Face
from pipelines.framing import Framing, fit
from pipelines.overrides import to_dict

ENCODED = 4  # references whose encodings are kept
OnStep = Callable[[int, int], None]  # (steps done, steps in all); may raise to stop


@dataclass(frozen=True)
class PreparedClip:
    """What is known before a clip is sampled: what a refinement is made from."""

    reference: np.ndarray  # (H0, W0, 3) uint8
    face: Face | None
    framing: Framing
    alignment: Retargeted
    driving: Pose
    conditions: Conditions
    settings: AnimationSettings
    size: tuple[int, int]


MakeRefiner = Callable[[PreparedClip], Refiner | None]


class AnimationPipeline:
    """Animator, alignment block and frozen encoders, ready to run.

    Args:
        animator: in evaluation mode.
        encoder: the frozen encoders that its configuration names.
        alignment: the learned block, or None for the closed form.
        settings: how the model is sampled where a call does not say.
        about: what else the model's folder says of it: licence, source.
        alignment_model: name and licence of the block, for the record.
    """

    def __init__(
        self,
        animator: Animator,
        encoder: ReferenceEncoder,
        alignment: AlignmentBlock | None,
        settings: AnimationSettings,
        about: dict[str, Any] | None = None,
        alignment_model: dict[str, str | None] | None = None,
    ):
        self.animator = animator
        self.encoder = encoder
        self.alignment = alignment
        self.settings = settings
        self.about = about or {}
        self.alignment_model = alignment_model or {}
        self.config = animator.config
        self._encoded: OrderedDict[str, EncodedReference] = OrderedDict()
        self._replicas: tuple[tuple[str, ...], list[Animator]] = ((), [animator])
        self._prepared: tuple[object, ...] = SpeedConfig().prepared

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        face: str = "auto",
        alignment: str = AUTO,
        device: str | torch.device | None = None,
        dtype: str = "auto",
    ) -> "AnimationPipeline":
        """Load a model folder.

        Args:
            alignment: which alignment block (see `open_alignment`); the folder's own by default,
                or the shipped one.
            device: the first GPU by default, the CPU where there is none.
            dtype: of the weights; `auto` is bf16 on a GPU that has it, fp16 on others and fp32
                on the CPU.

        Raises:
            ValueError: for a folder that does not hold what is needed (see `WeightsError`).
        """
        folder = Path(folder)
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        precision = weights_dtype(dtype, place)
        block, alignment_model = open_alignment(alignment, folder)  # first, as it is the quickest
        animator = Animator.from_pretrained(folder, dtype=precision, device=place)
        encoder = ReferenceEncoder(animator.config, folder, face, dtype=precision).to(place)
        about = read_config(folder)
        return cls(animator, encoder, block, settings_of(about), about, alignment_model)

    @property
    def device(self) -> torch.device:
        return self.animator.place

    def __call__(
        self,
        reference: np.ndarray,
        reference_pose: Pose,
        driving_pose: Pose,
        **options: Any,
    ) -> AnimationResult:
        """Animate the person of a picture; as `stream`, with all frames in memory at the end."""
        stream = self.stream(reference, reference_pose, driving_pose, **options)
        try:
            return stream.collect()
        finally:
            stream.states.remove()

    @torch.no_grad()
    def stream(
        self,
        reference: np.ndarray,
        reference_pose: Pose,
        driving_pose: Pose,
        *,
        fps: float,
        face: Face | None = None,
        faces: Sequence[Face] = (),
        framing: str = "pad",
        align: bool = True,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        settings: AnimationSettings | None = None,
        on_step: OnStep | None = None,
        on_work: OnStep | None = None,
        portion: int = PORTION,
        work: WorkPlace | None = None,
        refinement: MakeRefiner | None = None,
        timings: Timings | None = None,
    ) -> AnimationStream:
        """Animate the person of a picture; frames are decoded when they are read.

        Memory does not grow with the length of the clip, but for its latents where they are not
        kept in a work folder.

        Args:
            reference: uint8 RGB `(H0, W0, 3)`.
            reference_pose: keypoints `(N, 2)`, or `(P, N, 2)` with the main person first.
            driving_pose: keypoints `(T, P, N, 2)`.
            fps: of the driving clip.
            face: the reference's face, or None where it has none.
            faces: all faces of the reference, for the others where several people are animated.
            framing: how the reference is fitted into the model's size: pad or crop.
            align: False draws the driving poses where they are.
            size: (height, width) of the frames the model works on; its own by default.
            settings: of sampler, guidance and alignment; the model's own by default.
            on_step: called after each step with the steps done and all steps; may raise to stop.
            on_work: called within a step too, after each window.
            portion: frames that are refined at a time; changes memory, and, where faces are
                optimised, whose frames their statistics are of.
            work: where the clip's latents are kept, to be continued; the host's memory by default.
            refinement: makes what refines the predictions of each step, instead of what
                `settings.face` says.
            timings: told of the stages.

        Raises:
            ValueError: for options out of range, and for a work folder that cannot be used.
        """
        size = self.frame_size(size)
        settings, timings = settings or self.settings, timings or Timings()
        self._prepare(settings.speed, settings.devices)
        frame = fit(reference.shape[:2], size, framing)
        sizes = (reference_pose.size, driving_pose.size)
        thresholds = (reference_pose.threshold, driving_pose.threshold)
        still = reference_pose.keypoints, reference_pose.score
        moving = driving_pose.keypoints, driving_pose.score
        with timings.stage("alignment"):
            if align:
                alignment = retarget(
                    self.alignment, still, moving, sizes, thresholds, settings.alignment
                )
            else:
                pairs = matched(still, moving, sizes, thresholds, settings.alignment.people)
                alignment = unaligned(driving_pose.keypoints, sizes, pairs)
        score = alignment.drawn(
            driving_pose.score, driving_pose.threshold, others=settings.alignment.others
        )
        driving_pose = replace(driving_pose, score=score)
        owned = faces_of(reference_pose, alignment, face, faces)
        animated = [owned.get(person.reference) for person in alignment.people]
        with timings.stage("reference"):
            encoded = self._encode(reference, animated, frame, seed)
        given = (reference_pose.keypoints, reference_pose.score, driving_pose.keypoints)
        states = open_states(
            (len(driving_pose.score), *encoded.latents.shape[1:]),
            work,
            [to_dict(settings), seed, fps, size, framing, align, str(self.animator.dtype)],
            [reference, *(one and one.box for one in animated), *given, driving_pose.score],
            # What steps leave to later ones is not kept with the latents.
            every=math.lcm(settings.speed.cache_every, settings.face.refresh),
        )
        kept = states.kept(
            {
                "context": encoded.context,
                "reference": encoded.latents,
                "aligned": torch.from_numpy(alignment.keypoints),
                "keypoints": torch.tensor(driving_pose.keypoints),
                "score": torch.tensor(driving_pose.score),
            }
        )
        aligned, keypoints, score = (kept[n].numpy() for n in ("aligned", "keypoints", "score"))
        alignment = replace(alignment, keypoints=aligned)
        driving_pose = replace(driving_pose, keypoints=keypoints, score=score)
        poses = PoseImages(
            frame.points(aligned), score, size, driving_pose.threshold, self.config.pose_style
        )
        conditions = Conditions(
            kept["context"],
            PoseFeatures(self.animator.pose_net, poses),
            kept["reference"],
            self.encoder.time_ids(fps, 1).to(self.device),
            regions_of(alignment, poses, kept["reference"]),
        )
        try:
            refine, optimizer, no_faces = None, None, ""
            if refinement is None:
                optimizer, no_faces = open_face_optimizer(
                    settings.face,
                    self.encoder,
                    picture=reference,
                    face=face,
                    reference_pose=reference_pose,
                    driving_pose=driving_pose,
                    alignment=alignment,
                    framing=frame,
                    num_steps=settings.sampling.steps,
                    faces=owned,
                    on_iteration=on_work and (lambda i: on_work(i, settings.sampling.steps)),
                )
                if optimizer is not None:
                    optimizer.keep_in(states.folder, states.step)
                    refine = optimizer.refine
            else:
                refine = refinement(
                    PreparedClip(
                        reference, face, frame, alignment, driving_pose, conditions, settings, size
                    )
                )
            with timings.stage("sampling"):
                plan = self._sample(
                    states, conditions, poses, settings, seed, portion, refine, (on_step, on_work)
                )
        except BaseException:
            states.close()
            raise
        return AnimationStream(
            states,
            self.encoder.codec,
            self.device,
            poses,
            alignment,
            frame,
            settings,
            plan,
            optimizer,
            no_faces,
            faceless_people(reference_pose, alignment, owned),
        )

    def frame_size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """(height, width) to work at: the one asked for, or the model's own.

        Raises:
            ValueError: for one that the network cannot halve as often as it does.
        """
        if size is None:
            return self.config.height, self.config.width
        multiple = self.config.size_multiple
        if len(size) != 2 or min(size) < multiple or any(side % multiple for side in size):
            raise ValueError(
                f"Got a size of {'x'.join(map(str, size))}, but expected height and width as "
                f"multiples of {multiple} pixels; this model was made for "
                f"{self.config.height}x{self.config.width}."
            )
        return size

    def _prepare(self, speed: SpeedConfig, devices: tuple[str, ...]) -> None:
        """Change the model as the settings have it; what cannot be undone is refused."""
        if speed.offload and devices:
            raise ValueError(
                f"Got speed.offload with devices {', '.join(devices)}, but expected one of them: "
                "what is offloaded has no replicas."
            )
        if speed.prepared == self._prepared:
            return
        if self._prepared != SpeedConfig().prepared:
            raise ValueError(
                f"Got {speed}, but the model was prepared for another: load it again, or keep "
                "compile, channels_last, linears and offload as they are."
            )
        prepare(self.animator, speed)
        self._prepared = speed.prepared

    def _encode(
        self, reference: np.ndarray, faces: Sequence[Face | None], frame: Framing, seed: int
    ) -> EncodedReference:
        """The reference's encodings; those of the last few are remembered."""
        key = reference_key(reference, faces, frame, seed)
        if key not in self._encoded:
            found = encode_reference(self.animator, self.encoder, reference, faces, frame, seed)
            self._encoded[key] = found
            if len(self._encoded) > ENCODED:
                self._encoded.popitem(last=False)
        self._encoded.move_to_end(key)
        return self._encoded[key]

    def _sample(
        self,
        states: ClipStates,
        conditions: Conditions,
        poses: PoseImages,
        settings: AnimationSettings,
        seed: int,
        portion: int,
        refine: Refiner | None,
        told: tuple[OnStep | None, OnStep | None],
    ) -> Callable[[int], list[Window]]:
        """Bring the states to the clean latents; returns the windows of a step."""
        sampling = settings.sampling
        every = settings.speed.cache_every

        def plan(step: int) -> list[Window]:
            start = step - step % every  # windows stay while features are taken from the cache
            return plan_windows(len(poses), self.config.num_frames, settings.windows, start)

        denoisers = [
            GuidedDenoiser(
                animator,
                moved(conditions, poses, animator),
                settings.guidance,
                settings.speed.cache(animator),
            )
            for animator in self._animators(settings.devices)
        ]
        on_step, on_work = told
        sample(
            WindowedDenoiser(denoisers, plan, settings.windows.batch, every),
            states,
            sampling.levels(),
            sampling,
            ClipNoise(seed, states.shape[1:]),
            portion=portion,
            device=self.device,
            refine=refine,
            on_step=None if on_step is None else lambda i: on_step(i + 1, sampling.steps),
            on_work=None if on_work is None else lambda i: on_work(i, sampling.steps),
        )
        return plan

    def _animators(self, devices: tuple[str, ...]) -> list[Animator]:
        """A replica a device; they are kept for the next clip."""
        if self._replicas[0] != devices:
            self._replicas = (devices, replicas(self.animator, devices))
        return self._replicas[1]
