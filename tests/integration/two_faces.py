"""Two people of a real clip, refined towards two references, and what their faces became.

Poses, faces, matching and framing are found by the product's own code; only the network that would
make the prediction is missing, and the encoded clip stands in for it. The codec is the one without
weights, whose pictures are the clip's own: faces that a recognition network knows.

As a program it prints the tables of the benchmark, and keeps the pictures in a folder:
`python tests/integration/two_faces.py [FOLDER]`.

Shapes: T frames, P = 2 people of the clip, R = 2 people of the reference, all from left to right;
H W pixels.
"""

import dataclasses
import os
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from animator.config import AnimatorConfig
from inference.clip_conditions import faces_of
from inference.conditioning import ReferenceEncoder, to_frames, to_tensor
from inference.faces.config import FaceOptimizationConfig
from inference.faces.places import FacePlaces
from inference.faces.setup import open_face_optimizer
from inference.faces.similarity import FaceReader, arcface
from inference.people import faces_of_people
from inference.perception import Perception, Pose
from inference.retarget import matched, unaligned
from pipelines.faces import Face
from pipelines.framing import fit
from pipelines.images import read_image
from pipelines.video import iter_frames

SIZE = (384, 576)
CONFIG = FaceOptimizationConfig(mode="crop", steps=1, iterations=10, min_gain=0.0, margin=2)
NEAR = 1.0  # of a face's box, added on each side of it: pixels further off are far from it


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Which frames of a clip, and the portraits that are put side by side as the reference."""

    video: str  # in the folder of clips
    start: int  # first frame
    stride: int
    frames: int
    references: tuple[str, str]  # in the folder of pictures, from left to right


TALKING = Scene(
    video="dj_video3.mp4",
    start=400,
    stride=2,
    frames=3,
    references=("liveportrait_s4.jpg", "moore_anyone-3.png"),
)
FILM = Scene(
    video="goldeneye-vfr-drop3.mp4",
    start=148,
    stride=2,
    frames=3,
    references=("liveportrait_s4.jpg", "moore_anyone-3.png"),
)


@dataclass(frozen=True)
class Seen:
    """A clip and a reference as they were perceived."""

    frames: np.ndarray  # (T, H, W, 3) uint8
    places: FacePlaces  # where the detector sees the faces of the people of `driving`
    picture: np.ndarray  # (H, W, 3) uint8
    faces: list[Face]  # of the picture
    reference: Pose
    driving: Pose
    encoder: ReferenceEncoder
    across: list[int]  # people of `driving`, from left to right


@dataclass(frozen=True)
class Outcome:
    """Faces of the full decode, before and after."""

    pairs: list[tuple[int, int]]  # (reference, clip), both from left to right
    before: np.ndarray  # (P, R) cosine with each reference, mean over frames
    after: np.ndarray
    face_change: float  # grey levels (0..255) within the boxes of the faces
    far_change: float  # further than a face's size from all of them
    shown: np.ndarray  # (T, H, W, 3) uint8, decoded as it was
    made: np.ndarray  # decoded after the refinement

    @property
    def raised(self) -> np.ndarray:
        """How much more each person of the clip is like each reference, `(P, R)`."""
        return self.after - self.before

    def leaning(self, table: np.ndarray) -> np.ndarray:
        """Of a table `(P, R)`: by how much a person is nearer to its own reference, `(P,)`."""
        own = {person: reference for reference, person in self.pairs}
        return np.array([table[p, own[p]] - table[p, 1 - own[p]] for p in range(len(table))])


def see(scene: Scene, data: Path) -> Seen:
    """Frames, poses and faces of a scene.

    Args:
        data: folder with `video` and `image`; `ANIMATOR_MODELS` names that of the models.
    """
    video = data / "video" / scene.video
    perception = Perception()
    taken = islice(iter_frames(video), scene.start, None, scene.stride)
    frames = [fit(f.shape[:2], SIZE, "crop").image(f) for f in islice(taken, scene.frames)]
    info = dataclasses.replace(perception.probe(video), height=SIZE[0], width=SIZE[1])
    driving = perception.driving(video, info, frames)
    half = (2 * SIZE[0], SIZE[1])
    portraits = [read_image(data / "image" / name) for name in scene.references]
    picture = np.hstack([fit(p.shape[:2], half, "crop").image(p) for p in portraits])
    faces = perception.faces_in(data, picture)
    reference = perception.reference(data, picture, faces[0])
    places = _places(driving, frames, perception)
    config = AnimatorConfig(
        height=SIZE[0],
        width=SIZE[1],
        face_embedding="insightface",
        face_embedding_dim=perception.faces.embedding_dim,
    )
    middles = places.boxes[..., ::2].mean(-1).sum(0) / np.maximum(places.visible.sum(0), 1)
    people = np.flatnonzero(places.visible.all(0))
    across = sorted(people.tolist(), key=lambda person: float(middles[person]))
    encoder = ReferenceEncoder(config)
    return Seen(np.stack(frames), places, picture, faces, reference, driving, encoder, across)


def refine(seen: Seen, order: tuple[int, ...]) -> Outcome:
    """The encoded clip with the references in this order, after one step's refinement."""
    reference, driving, encoder = seen.reference, seen.driving, seen.encoder
    sizes = (reference.size, driving.size)
    pairs = matched(
        (reference.keypoints, reference.score),
        (driving.keypoints, driving.score),
        sizes,
        (reference.threshold, driving.threshold),
        order,
    )
    alignment = unaligned(driving.keypoints, sizes, pairs)
    optimizer, reason = open_face_optimizer(
        CONFIG,
        encoder,
        picture=seen.picture,
        face=seen.faces[0],
        reference_pose=reference,
        driving_pose=driving,
        alignment=alignment,
        framing=fit(seen.picture.shape[:2], SIZE, "crop"),
        num_steps=25,
        faces=faces_of(reference, alignment, seen.faces[0], seen.faces),
    )
    assert optimizer is not None, reason
    with torch.no_grad():
        latents = torch.cat([encoder.codec.encode(to_tensor(f)[None]) for f in seen.frames])
    refined = optimizer.refine(latents, torch.arange(len(latents)), 0)
    with torch.no_grad():
        shown, made = encoder.codec.decode(latents), encoder.codec.decode(refined)
    wanted, from_left = _references(seen)
    change = np.abs(to_frames(made).astype(np.float32) - to_frames(shown)).mean(-1)
    inside, near = (_around(seen.places, margin) for margin in (0.0, NEAR))
    return Outcome(
        pairs=sorted((from_left.index(r), seen.across.index(p)) for r, p in pairs),
        before=_cosines(seen, shown, wanted),
        after=_cosines(seen, made, wanted),
        face_change=float(change[inside].mean()),
        far_change=float(change[~near].mean()),
        shown=to_frames(shown),
        made=to_frames(made),
    )


def known(seen: Seen, shown: np.ndarray) -> np.ndarray:
    """Cosine of each decoded face with the same face of the clip's own frame, `(T, P)`."""
    own, decoded = (_embeddings(seen, to_tensor(f)) for f in (seen.frames, shown))
    return torch.cosine_similarity(own, decoded, dim=-1).numpy()


def _places(driving: Pose, frames: list[np.ndarray], perception: Perception) -> FacePlaces:
    """Where the detector sees the faces of the people of the clip."""
    count, people = driving.score.shape[:2]
    places = FacePlaces(
        visible=np.zeros((count, people), bool),
        landmarks=np.full((count, people, 5, 2), np.nan, np.float32),
        boxes=np.zeros((count, people, 4), np.float32),
        size=SIZE,
    )
    for t, frame in enumerate(frames):
        found = perception.faces.detect(frame)
        keypoints, score = driving.keypoints[t], driving.score[t]
        owned = faces_of_people(keypoints, score, found, None, driving.threshold)
        for person, face in owned.items():
            places.visible[t, person] = True
            places.landmarks[t, person], places.boxes[t, person] = face.landmarks, face.box
    return places


def _reader(seen: Seen) -> FaceReader:
    path: Path = getattr(seen.encoder.recogniser, "recogniser_path")  # noqa: B009
    return FaceReader(arcface(path, torch.device("cpu")))


def _embeddings(seen: Seen, frames: Tensor) -> Tensor:
    """Of the people from left to right in frames `(T, 3, H, W)`, at the detector's places:
    `(T, P, E)`."""
    places = seen.places
    with torch.no_grad():
        found = [
            _reader(seen).embed(
                frames,
                torch.from_numpy(places.landmarks[:, person]),
                torch.from_numpy(places.boxes[:, person]),
            )
            for person in seen.across
        ]
    return torch.stack(found, 1)


def _references(seen: Seen) -> tuple[Tensor, list[int]]:
    """Embeddings `(R, E)` of the picture's people from left to right, and their numbers."""
    pose = seen.reference
    owned = faces_of_people(pose.keypoints, pose.score, seen.faces, seen.faces[0], pose.threshold)
    from_left = sorted(owned, key=lambda person: float(owned[person].box[0]))
    with torch.no_grad():
        found = [
            _reader(seen).embed(
                to_tensor(seen.picture)[None],
                torch.from_numpy(owned[person].landmarks)[None],
                torch.from_numpy(owned[person].box)[None],
            )[0]
            for person in from_left
        ]
    return torch.stack(found), from_left


def _cosines(seen: Seen, frames: Tensor, wanted: Tensor) -> np.ndarray:
    """Cosine of each person with each reference, mean over frames, `(P, R)`."""
    found = _embeddings(seen, frames)[:, :, None]
    return torch.cosine_similarity(found, wanted[None, None], dim=-1).mean(0).numpy()


def _around(places: FacePlaces, margin: float) -> np.ndarray:
    """Pixels `(T, H, W)` in the boxes of the faces, with a margin as a share of their sides."""
    height, width = places.size
    inside = np.zeros((len(places.visible), height, width), bool)
    for t, person in np.argwhere(places.visible):
        x0, y0, x1, y1 = places.boxes[t, person] * np.tile([width, height], 2)
        across, down = margin * (x1 - x0), margin * (y1 - y0)
        rows = slice(max(0, int(y0 - down)), max(0, int(y1 + down)))
        inside[t, rows, max(0, int(x0 - across)) : max(0, int(x1 + across))] = True
    return inside


def main(data: Path, folder: Path | None) -> None:
    """Print the tables of both scenes; keep pictures where a folder is given."""
    for name, scene in (("talking", TALKING), ("film", FILM)):
        seen, rows = see(scene, data), []
        for order in ((), (2, 1)):
            got = refine(seen, order)
            rows.append(got)
            print(name, order, "pairs", got.pairs)
            print(" before", got.before.round(3).tolist())
            print(" after ", got.after.round(3).tolist())
            print(" raised", got.raised.round(3).tolist(), "leaning", got.leaning(got.after))
            print(f" change: faces {got.face_change:.2f}, far {got.far_change:.3f}")
        print(" decoded against own", known(seen, rows[0].shown).round(2).tolist())
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            strips = [seen.frames, rows[0].shown, *(got.made for got in rows)]
            sheet = np.vstack([np.hstack(list(strip)) for strip in strips])
            cv2.imwrite(str(folder / f"{name}.png"), sheet[..., ::-1])
            cv2.imwrite(str(folder / f"{name}-reference.png"), seen.picture[..., ::-1])


if __name__ == "__main__":
    shared = os.environ.get("ANIMATOR_TEST_DATA")
    if shared is None:
        sys.exit("Set ANIMATOR_TEST_DATA to the folder that holds data/video and data/image.")
    os.environ.setdefault("ANIMATOR_MODELS", str(Path(shared) / "data" / "models"))
    main(Path(shared) / "data", Path(sys.argv[1]) if len(sys.argv) > 1 else None)
