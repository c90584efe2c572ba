"""From what a pipeline knows before sampling to what optimises the faces, or the reason against it.

Shapes: P people, K keypoints, E embedding.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from animator.onnx_file import OnnxError
from inference.conditioning import ReferenceEncoder, to_tensor
from inference.faces.config import FaceOptimizationConfig
from inference.faces.optimizer import FaceOptimizer
from inference.faces.places import ReferenceFace, places_of_faces
from inference.faces.similarity import FaceReader, arcface
from inference.people import faces_of_people
from inference.perception import Pose
from inference.retarget import Retargeted
from pipelines.faces import Face
from pipelines.framing import Framing

Opened = tuple[FaceOptimizer | None, str]  # the reason where there is none; empty: not asked for


def open_face_optimizer(
    config: FaceOptimizationConfig,
    encoder: ReferenceEncoder,
    *,
    picture: np.ndarray,
    face: Face | None,
    reference_pose: Pose,
    driving_pose: Pose,
    alignment: Retargeted,
    framing: Framing,
    num_steps: int,
    faces: Mapping[int, Face] | None = None,
    on_iteration: Callable[[int], object] | None = None,
) -> Opened:
    """The optimiser of a clip's faces, or None and why.

    Args:
        picture: the reference, uint8 RGB at its own size.
        face: of its main person; faces of the others are looked for where several are matched.
        reference_pose, driving_pose, alignment: who is where; the driving poses' keypoints are
            those of the alignment.
        framing: how the picture lies in the frames that are made.
        num_steps: denoising steps.
        faces: of the people of the picture, by their number; those of others than the main person
            are looked for where they are not given.
        on_iteration: called with the step after each iteration; may raise to stop.
    """
    if config.mode == "auto":
        config = replace(config, mode="off" if encoder.recogniser is None else "crop")
    if config.mode == "off":
        return None, ""
    if face is None:
        return None, "no face was found in the reference"
    codec: Any = encoder.codec
    device = next((p.device for p in codec.parameters()), torch.device("cpu"))
    reader, reason = _reader(encoder, config, device)
    if reader is None:
        return None, reason
    if reader.by == "landmarks" and not np.isfinite(face.landmarks).all():
        return None, "the reference's face was found without eyes, nose and mouth"
    people = _people(reference_pose)
    if faces is None:
        faces = {0: face}
        if encoder.recogniser is not None and len(alignment.people) > 1:
            faces = faces_of_people(
                *people, encoder.recogniser.detect(picture), face, reference_pose.threshold
            )
    targets = torch.zeros(driving_pose.score.shape[1], 0)
    references: dict[int, ReferenceFace] = {}
    for pair in alignment.people:
        own = faces.get(pair.reference)
        if own is None:
            continue
        target = _target(reader, picture, own, framing, device)
        if not references:
            targets = torch.zeros(driving_pose.score.shape[1], target.shape[-1], device=device)
        targets[pair.driving] = target
        keypoints, score = people[0][pair.reference], people[1][pair.reference]
        references[pair.driving] = ReferenceFace.of(
            framing.points(own.landmarks),
            framing.boxes(own.box),
            framing.points(keypoints),
            (score >= reference_pose.threshold).astype(np.float32),
        )
    places = places_of_faces(
        framing.points(alignment.keypoints),
        driving_pose.score,
        driving_pose.threshold,
        references,
        framing.target,
        config.min_face,
    )
    if not places.visible.any():
        return None, (
            f"no face of at least {config.min_face:g} pixels looks at the camera in any frame"
        )
    optimizer = FaceOptimizer(
        codec,
        reader,
        targets,
        places,
        config,
        num_steps=num_steps,
        detector=encoder.recogniser,
        on_iteration=on_iteration,
    )
    return optimizer, ""


def _reader(
    encoder: ReferenceEncoder, config: FaceOptimizationConfig, device: torch.device
) -> tuple[FaceReader | None, str]:
    by = "box" if config.mode == "published" else "landmarks"
    if encoder.recogniser is None:
        return FaceReader(encoder.face_thumbnail, by="box"), ""
    path = getattr(encoder.recogniser, "recogniser_path", None)
    if path is None:
        return None, f"{encoder.recogniser.name} has no recognition network with gradients"
    try:
        return FaceReader(arcface(path, device), by=by), ""
    except OnnxError as error:
        return None, f"the recognition network cannot be used with gradients ({error})"


def _target(
    reader: FaceReader, picture: np.ndarray, face: Face, framing: Framing, device: torch.device
) -> Tensor:
    """Embedding `(E,)` of the reference's face; what goes by boxes sees it in the frame."""
    box = face.box
    if reader.by == "box":
        picture, box = framing.image(picture), framing.boxes(face.box)
    with torch.no_grad():
        found = reader.embed(
            to_tensor(picture)[None].to(device),
            torch.from_numpy(np.asarray(face.landmarks, np.float32))[None].to(device),
            torch.from_numpy(np.asarray(box, np.float32))[None].to(device),
        )
    return found[0]


def _people(pose: Pose) -> tuple[np.ndarray, np.ndarray]:
    """Keypoints `(P, K, 2)` and score `(P, K)` of a picture."""
    if pose.keypoints.ndim == 2:
        return pose.keypoints[None], pose.score[None]
    return pose.keypoints, pose.score
