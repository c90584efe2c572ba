"""How far one result is from another of the same seed: in pixels, and in the face it shows.

Shapes: T frames, P people, H W pixels of the result, E embedding.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from inference.conditioning import ReferenceEncoder, to_tensor
from inference.faces.config import FaceOptimizationConfig
from inference.faces.places import FacePlaces
from inference.faces.setup import open_face_optimizer
from inference.faces.similarity import FaceReader, arcface, similarities
from inference.metrics import psnr
from inference.perception import Pose
from inference.retarget import Retargeted
from pipelines.faces import Face
from pipelines.framing import Framing

AT_ONCE = 16  # frames
LEAST_FACE = 8.0  # pixels of a face that is compared: small models show small ones


@dataclass(frozen=True)
class IdentityJudge:
    """Likeness of a result's faces to the reference's, at the places that its poses give.

    Places are the same whatever the result shows, so results of one request compare.
    """

    reader: FaceReader
    target: Tensor  # (E,)
    places: FacePlaces
    person: int  # of the places
    framing: Framing

    @torch.no_grad()
    def similarity(self, frames: np.ndarray) -> float:
        """Mean cosine over the frames `(T, H, W, 3)` whose face can be seen."""
        x0, y0, _, _ = self.framing.inner_box()
        seen = np.flatnonzero(self.places.visible[: len(frames), self.person])
        found = []
        for part in np.split(seen, range(AT_ONCE, len(seen), AT_ONCE)):
            # Places are those of the model's frames, whose padding results do not have.
            whole = np.zeros((len(part), *self.places.size, 3), np.uint8)
            whole[:, y0 : y0 + frames.shape[1], x0 : x0 + frames.shape[2]] = frames[part]
            points, boxes = (
                torch.from_numpy(every[part, self.person])
                for every in (self.places.landmarks, self.places.boxes)
            )
            place = self.target.device
            embeddings = self.reader.embed(
                to_tensor(whole).to(place), points.to(place), boxes.to(place)
            )
            found.append(similarities(embeddings, self.target))
        return float(torch.cat(found).mean())


def open_judge(
    encoder: ReferenceEncoder,
    *,
    picture: np.ndarray,
    face: Face | None,
    reference_pose: Pose,
    driving_pose: Pose,
    alignment: Retargeted,
    framing: Framing,
    network: Path | None = None,
) -> IdentityJudge | None:
    """A judge of the main person, or None where there is no face to judge.

    Args:
        picture, face, reference_pose, driving_pose, alignment, framing: what was animated, as for
            `open_face_optimizer`.
        network: a recognition network for models that have none; without it such a model's own
            face embedding judges.
    """
    optimizer, _ = open_face_optimizer(
        FaceOptimizationConfig(mode="crop", min_face=LEAST_FACE),
        encoder,
        picture=picture,
        face=face,
        reference_pose=reference_pose,
        driving_pose=driving_pose,
        alignment=alignment,
        framing=framing,
        num_steps=1,
    )
    person = alignment.main.driving
    if optimizer is None or face is None or not optimizer.places.visible[:, person].any():
        return None
    reader, target = optimizer.reader, optimizer.targets[person]
    if encoder.recogniser is None and network is not None and np.isfinite(face.landmarks).all():
        reader = FaceReader(arcface(network, torch.device("cpu")))
        points, box = (
            torch.from_numpy(np.asarray(each, np.float32))[None]
            for each in (face.landmarks, face.box)
        )
        with torch.no_grad():
            target = reader.embed(to_tensor(picture)[None], points, box)[0]
    return IdentityJudge(reader, target, optimizer.places, person, framing)


def distance(frames: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """`psnr` of all frames `(T, H, W, 3)` against others, and `psnr_least` of the worst, in dB."""
    return {"psnr": psnr(frames, truth), "psnr_least": min(map(psnr, frames, truth))}
