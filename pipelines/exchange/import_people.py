"""The people and faces of an imported clip, and where they are from: files, masks, or networks.

T frames, P people, F faces of a frame. Coordinates are 0..1 of the stored frame.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import schema
from pipelines.curation.tracks import FaceLinker, strongest
from pipelines.exchange.face_masks import mask_boxes
from pipelines.exchange.frame_folder import (
    ExchangeError,
    FrameFolder,
    PictureLimits,
    numbered_pictures,
)
from pipelines.exchange.scan import FACES
from pipelines.faces import Face, FaceBackend
from pipelines.images import read_image
from pipelines.pose import PoseBackend, PoseTrack
from pipelines.pose_file import MAX_FILE_BYTES, FilePoseBackend
from pipelines.schema import FaceTrack, ShardError
from pipelines.video import iter_frames

FACE_FILE = "clip.face.npz"


@dataclass(frozen=True, kw_only=True)
class OpenClip:
    """An item before it is stored: its folder of frames, or None for a video.

    path: the folder or the video. notes: what its provenance is to say.
    """

    path: Path
    frames: FrameFolder | None
    rate: Fraction
    sha256: str
    info: dict[str, Any]
    notes: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class StoredVideo:
    """A clip as it was encoded; `scale` (2,) is what padding makes of coordinates in 0..1."""

    path: Path
    num_frames: int
    fps: float
    scale: np.ndarray


def find_people(
    clip: OpenClip, stored: StoredVideo, keypoints: Path | None, network: PoseBackend, limit: int
) -> tuple[PoseTrack, str]:
    """The `limit` strongest people of every frame, and where they are from.

    Args:
        keypoints: a file of them, which comes before the network.

    Raises:
        PoseError: the file is no keypoints file, or of another number of frames.
        ExchangeError: it is a link, or there is neither a file nor a folder of frames.
    """
    if keypoints is not None:
        track, origin = _from_file(clip, stored, keypoints), keypoints.name
    elif clip.frames is not None:
        track = network.track(clip.frames)
        origin = f"{track.backend} over the frames"
    else:
        raise ExchangeError("no keypoints were found for it")
    track = replace(
        track,
        keypoints=(track.keypoints * stored.scale).astype(np.float32),
        boxes=(track.boxes * np.tile(stored.scale, 2)).astype(np.float32),
    )
    return strongest(track, limit), origin


def find_faces(
    clip: OpenClip,
    stored: StoredVideo,
    pose: PoseTrack,
    network: FaceBackend,
    limits: PictureLimits,
    *,
    max_people: int,
    looks_per_second: float,
) -> tuple[FaceTrack, str]:
    """The faces of every frame, and where they are from.

    An export's own file comes first, then masks, then the network, which looks now and then.
    """
    linker = FaceLinker(max_people)
    if clip.frames is not None:
        kept = _stored_faces(clip.path / FACE_FILE, stored.num_frames)
        if kept is not None:
            return kept, FACE_FILE
        if _add_masks(linker, clip.path / FACES, clip.frames, stored.scale, limits):
            track = linker.track(stored.num_frames, pose, "masks", "")
            return track, f"masks in {FACES}/"
    every = max(1, round(stored.fps / looks_per_second))
    for index, frame in enumerate(iter_frames(stored.path, fps=stored.fps)):
        if index % every == 0 and index < stored.num_frames:
            linker.add(index, [(face, None) for face in network.detect(frame)])
    track = linker.track(stored.num_frames, pose, network.name, network.channel_order)
    return track, f"{network.name} over the frames"


def _from_file(clip: OpenClip, stored: StoredVideo, path: Path) -> PoseTrack:
    """Keypoints by the reader that looks for them beside a video, so they are laid there."""
    if path.is_symlink():
        raise ExchangeError(f"{path.name} is a link; links are not followed")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ExchangeError(f"{path.name} has more than {MAX_FILE_BYTES} bytes of keypoints")
    beside = stored.path.with_name("keypoints.mp4")
    shutil.copyfile(path, beside.with_name("keypoints.pose.npz"))
    beside.symlink_to(stored.path if clip.frames is not None else clip.path)
    if clip.frames is not None:
        track = FilePoseBackend().track(clip.frames, source=beside)
    else:
        times = np.arange(stored.num_frames) / stored.fps
        # Of the frames themselves, it takes no more than how many there are.
        blank: Sequence[np.ndarray] = [np.empty(0)] * stored.num_frames
        track = FilePoseBackend().track(blank, source=beside, times=times)
    return replace(track, backend=f"file:{path.name}")


def _add_masks(
    linker: FaceLinker, folder: Path, frames: FrameFolder, scale: np.ndarray, limits: PictureLimits
) -> bool:
    """Take the boxes of the masks of every frame; False where there are no masks."""
    if not folder.is_dir():
        return False
    masks = numbered_pictures(folder, limits)
    for index, number in enumerate(frames.numbers):
        boxes = np.zeros((0, 4), np.float32)
        if number in masks:
            boxes = mask_boxes(read_image(masks[number].path, limits.image()))
        found = [Face(box=box, score=1.0) for box in boxes * np.tile(scale, 2)]
        linker.add(index, [(face, None) for face in found])
    return bool(masks)


def _stored_faces(path: Path, num_frames: int) -> FaceTrack | None:
    """The faces an export laid beside its pictures; None where they are not of these frames."""
    try:
        if path.is_symlink() or path.stat().st_size > schema.MAX_ARRAYS_BYTES:
            return None
        arrays = schema.unpack_arrays(path.read_bytes(), path.name)
        schema.check_faces(arrays, num_frames, path.name)
    except (OSError, ShardError):
        return None
    return FaceTrack(
        boxes=np.nan_to_num(arrays["boxes"]).clip(0, 1).astype(np.float32),
        landmarks=arrays["landmarks"].astype(np.float32),
        score=np.nan_to_num(arrays["score"]).clip(0, 1).astype(np.float32),
        model=str(arrays.get("model", ""))[:80],
        channel_order=str(arrays.get("channel_order", ""))[:8],
    )
