"""Small shards of clips for the tests of encoding: moving stripes, keypoints and faces."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipelines import schema, shards
from pipelines.schema import ClipRecord, ShardRecord, SourceRecord
from pipelines.video_encode import encode

FPS, HEIGHT, WIDTH = 8.0, 72, 56


def moving_stripes(num_frames: int, seed: int, size: tuple[int, int] = (HEIGHT, WIDTH)):
    """Frames that differ from one another everywhere, and from those of another seed."""
    rng = np.random.default_rng(seed)
    row = rng.integers(0, 255, (8, 8, 3)).astype(np.uint8)
    picture = np.kron(row, np.ones((size[0] // 8, size[1] // 8, 1), np.uint8))
    return [np.roll(picture, 3 * index, axis=1) for index in range(num_frames)]


def write_clips(
    folder: Path,
    name: str,
    clips: Mapping[str, Sequence[np.ndarray]],
    *,
    damaged: Sequence[str] = (),
    faces: Mapping[str, np.ndarray] | None = None,
) -> ShardRecord:
    """Commit a shard of these clips into `folder`.

    Args:
        clips: frames (H, W, 3) by key; those in `damaged` are stored as bytes that are no video.
        faces: arrays of every clip's face.npz but the frames' axis, which is added.
    """
    folder.mkdir(parents=True, exist_ok=True)
    work = folder / ".staged"
    work.mkdir()
    members: dict[str, bytes | Path] = {}
    records = []
    for key, frames in clips.items():
        length, (height, width) = len(frames), frames[0].shape[:2]
        video = work / f"{key}.mp4"
        encode(video, frames, fps=FPS, preset="ultrafast")
        if key in damaged:
            video.write_bytes(b"no video at all" * 50)
        face = {
            "boxes": np.zeros((length, 1, 4), np.float32),
            "landmarks": np.zeros((length, 1, 5, 2), np.float32),
            "score": np.zeros((length, 1), np.float32),
        }
        for part, value in (faces or {}).items():
            face[part] = np.repeat(value[None].astype(np.float32), length, axis=0)
        members |= {
            f"{key}.mp4": video,
            f"{key}.pose.npz": schema.pack_arrays(
                {
                    "keypoints": np.full((length, 1, 18, 2), 0.5, np.float32),
                    "score": np.ones((length, 1, 18), np.float32),
                    "boxes": np.zeros((length, 1, 4), np.float32),
                }
            ),
            f"{key}.face.npz": schema.pack_arrays(face),
            f"{key}.json": schema.encode_json({"key": key, "provenance": {"licence": "CC0"}}),
        }
        records.append(
            ClipRecord(
                key=key,
                start=0.0,
                end=length / FPS,
                verdict="kept",
                num_frames=length,
                fps=FPS,
                width=width,
                height=height,
            )
        )
    rejected = ClipRecord(key=f"no_{name[-6:]}", start=0.0, end=1.0, verdict="rejected")
    source = SourceRecord(
        id=name, sha256="a", bytes=1, uris=("a",), verdict="kept", clips=(*records, rejected)
    )
    tar = work / f"{name}.tar"
    sizes = shards.write_tar(tar, members)
    record = ShardRecord(
        name=name,
        config_hash="c",
        tar_sha256=shards.sha256_file(tar),
        tar_bytes=tar.stat().st_size,
        members=sizes,
        counts={},
        sources=(source,),
    )
    shards.commit(folder, tar, record)
    for path in work.iterdir():
        path.unlink()
    work.rmdir()
    return record


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run but the lock, by its name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
