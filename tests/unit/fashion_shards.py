"""A small shard of the real fashion clips with their keypoints, for the tests of training."""

from pathlib import Path

import numpy as np

from pipelines import schema, shards
from pipelines.pose_file import FilePoseBackend
from pipelines.schema import ClipRecord, ShardRecord, SourceRecord
from pipelines.video import decode
from pipelines.video_encode import encode

FPS = 8.0
NAMES = ("ubc_91-3003CN5S", "ubc_91BjuE6irxS")


def write_fashion(data_root: Path, folder: Path, *, seconds: float = 2.5, side: int = 160) -> Path:
    """Commit a shard of the beginning of both clips into `folder`, which it makes.

    Args:
        data_root: the folder of real data.
        side: pixels of the longer side.
    """
    folder.mkdir(parents=True)
    members: dict[str, bytes | Path] = {}
    records = []
    for number, name in enumerate(NAMES):
        key, video = f"clip{number}_000", data_root / "pose2d" / f"{name}.mp4"
        frames = decode(video, end=seconds, fps=FPS, max_side=side)
        length, height, width = frames.shape[:3]
        height, width = height - height % 2, width - width % 2  # as stored clips have it
        frames = frames[:, :height, :width]
        track = FilePoseBackend().track(frames, source=video, times=np.arange(length) / FPS)
        film = folder / f".{key}.mp4"
        encode(film, frames, fps=FPS)
        points, score = track.keypoints[:, 0], track.score[:, 0]
        nose = points[:, :1]
        boxes = np.concatenate([nose - 0.05, nose + 0.05], -1).clip(0, 1)
        members |= {
            f"{key}.mp4": film,
            f"{key}.pose.npz": schema.pack_arrays(
                {"keypoints": track.keypoints, "score": track.score, "boxes": track.boxes}
            ),
            f"{key}.face.npz": schema.pack_arrays(
                {
                    "boxes": boxes.astype(np.float32),
                    "landmarks": np.repeat(nose[:, :, None], 5, 2).astype(np.float32),
                    "score": score[:, :1].astype(np.float32),
                }
            ),
            f"{key}.json": schema.encode_json({"key": key}),
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
    source = SourceRecord(
        id="a", sha256="a", bytes=1, uris=("a",), verdict="kept", clips=tuple(records)
    )
    tar = folder / ".staged.tar"
    sizes = shards.write_tar(tar, members)
    record = ShardRecord(
        name=schema.shard_name(0),
        config_hash="c",
        tar_sha256=shards.sha256_file(tar),
        tar_bytes=tar.stat().st_size,
        members=sizes,
        counts={},
        sources=(source,),
    )
    shards.commit(folder, tar, record)
    for film in folder.glob(".*.mp4"):
        film.unlink()
    return folder
