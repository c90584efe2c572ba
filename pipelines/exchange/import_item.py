"""One clip of another layout on its way into a shard: opened, encoded, annotated, recorded."""

import errno
import faulthandler
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import schema, shards
from pipelines.curation.thumbnails import draw_thumbnail, encode_jpeg
from pipelines.exchange.frame_folder import ExchangeError, FrameFolder, numbered_pictures
from pipelines.exchange.import_config import ImportConfig
from pipelines.exchange.import_people import OpenClip, StoredVideo, find_faces, find_people
from pipelines.exchange.scan import POSES, ImportItem, frames_folder, read_card
from pipelines.faces import Face, FaceBackend, open_face_backend
from pipelines.images import ImageError
from pipelines.pose import PoseError, PoseTrack
from pipelines.pose_backends import open_pose_backend
from pipelines.schema import ClipRecord, FaceTrack, Scores, ShardError, SourceRecord
from pipelines.versions import versions_of
from pipelines.video import VideoError, encode, iter_frames, probe

_PACKAGES = ("av", "numpy", "opencv-python", "onnxruntime", "pillow")
_ERROR_LENGTH = 300
_KNOWN_ERRORS = (ExchangeError, ImageError, PoseError, VideoError, ShardError)
# The machine's troubles, not the clip's: the import must stop, not write clips off.
_MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE}
_MAX_FPS = 240.0


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What became of an item: its record, the members' files by name, a thumbnail's file."""

    record: SourceRecord
    members: dict[str, Path] = field(default_factory=dict)
    thumbnail: Path | None = None


def versions() -> dict[str, str]:
    """Versions of the code and of the libraries that decide what is written."""
    return versions_of(*_PACKAGES)


class Importer:
    """Takes items over; holds the models, which are opened once a process."""

    def __init__(self, root: Path, config: ImportConfig, config_hash: str) -> None:
        self.root = root
        self.config = config
        self.config_hash = config_hash
        # One thread each keeps sums in one order; processes fill the cores.
        self.pose = open_pose_backend(config.pose, threads=1)
        self.face: FaceBackend = open_face_backend(config.face, threads=1)

    def models(self) -> dict[str, str]:
        """The name of each model, which every shard of an import must share."""
        return {"face": self.face.name, "pose": f"{self.pose.name} ({self.pose.reason})"}

    def describe(self) -> dict[str, dict[str, Any]]:
        """Name and licence of each model, for the records."""
        return {
            "face": {"name": self.face.name, "licence": self.face.licence},
            "pose": {"name": self.pose.name, "licence": self.pose.licence},
        }

    def run(self, item: ImportItem, staging: Path) -> Imported:
        """Take one item over; whatever is wrong with it goes into its record.

        Raises:
            OSError, VideoError: the machine's own trouble, such as a full disk.
        """
        if item.error:
            return Imported(record=failed_record(item, item.error))
        staging.mkdir(parents=True)
        # A decoder that never returns cannot be interrupted, so the process ends.
        faulthandler.dump_traceback_later(self.config.timeout_seconds, exit=True, file=2)
        try:
            return self._take(item, staging)
        except Exception as error:
            if _is_of_machine(error):
                raise
            shutil.rmtree(staging, ignore_errors=True)
            return Imported(record=failed_record(item, self._sentence(error, item, staging)))
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _sentence(self, error: Exception, item: ImportItem, staging: Path) -> str:
        """One line that says nothing of where the folders lie, so that runs compare equal."""
        text = " ".join(str(error).split()) or type(error).__name__
        text = text.replace(f"{staging}/", "").replace(f"{self.root / item.uri}/", "")
        text = text.replace(f"{self.root / item.uri}: ", "").replace(f"{self.root}/", "")
        return text if isinstance(error, _KNOWN_ERRORS) else f"{type(error).__name__}: {text}"

    def _take(self, item: ImportItem, staging: Path) -> Imported:
        path = self.root / item.uri
        clip = self._open_folder(path) if item.pictures else self._open_video(path)
        key = schema.check_key(item.key or f"{clip.sha256[:16]}_000")
        stored = self._encode(clip, staging / f"{key}.mp4")
        keypoints = self.root / item.keypoints if item.keypoints else None
        pose, pose_from = find_people(clip, stored, keypoints, self.pose, self.config.max_people)
        faces, faces_from = find_faces(
            clip,
            stored,
            pose,
            self.face,
            self.config.pictures(),
            max_people=self.config.max_people,
            looks_per_second=self.config.face_fps,
        )
        scores = _scores(clip, stored, pose, faces)
        nobody = scores["pose_missing"] == 1.0
        info = probe(stored.path)
        record = ClipRecord(
            key=key,
            start=0.0,
            end=stored.num_frames / stored.fps,
            verdict="rejected" if nobody else "kept",
            reasons=("missing_keypoints",) if nobody else (),
            scores=scores,
            num_frames=stored.num_frames,
            fps=stored.fps,
            width=info.width,
            height=info.height,
        )
        source = SourceRecord(
            id=item.id,
            sha256=clip.sha256,
            bytes=item.bytes,
            uris=(item.uri,),
            verdict=record.verdict,
            reasons=record.reasons,
            info=clip.info,
            scores=scores,
            clips=(record,),
            provenance={
                "licence": "unknown",
                "uploader": None,
                "keypoints_from": pose_from,
                "faces_from": faces_from,
                **clip.notes,
            },
        )
        for rest in staging.glob("keypoints.*"):
            rest.unlink()
        return Imported(
            record=source,
            members={} if nobody else self._members(source, stored, pose, faces),
            thumbnail=_thumbnail(stored, pose, faces),
        )

    def _open_folder(self, path: Path) -> OpenClip:
        frames = FrameFolder(frames_folder(path), self.config.pictures())
        card = read_card(path) or {}
        said = card.get("fps")
        fps = said if isinstance(said, int | float) and 0 < said <= _MAX_FPS else None
        rate = Fraction(fps or self.config.fps).limit_denominator(1001)
        first = frames[0]
        notes: dict[str, Any] = {"fps_from": "the folder" if fps else "given for all"}
        if (path / POSES).is_dir() and not (path / POSES).is_symlink():
            count = len(numbered_pictures(path / POSES, self.config.pictures()))
            notes["pose_pictures"] = f"{count} in {POSES}/, not read"
        if card:
            notes["exported"] = {name: card.get(name) for name in ("key", "source", "provenance")}
        info = {
            "width": first.shape[1],
            "height": first.shape[0],
            "fps": float(rate),
            "seconds": len(frames) / float(rate),
            "pictures": len(frames),
            "missing_numbers": frames.missing_numbers,
        }
        return OpenClip(
            path=path, frames=frames, rate=rate, sha256=frames.sha256(), info=info, notes=notes
        )

    def _open_video(self, path: Path) -> OpenClip:
        if path.is_symlink():
            raise ExchangeError("it is a link; links are not followed")
        found = probe(path, self.config.video())
        info = {
            "width": found.width,
            "height": found.height,
            "fps": found.fps,
            "seconds": found.seconds,
            "codec": found.codec,
            "rotation": found.rotation,
            "variable_rate": found.variable_rate,
        }
        return OpenClip(
            path=path,
            frames=None,
            rate=Fraction(found.fps).limit_denominator(1001),
            sha256=shards.sha256_file(path),
            info=info,
            notes={"fps_from": "the video"},
        )

    def _encode(self, clip: OpenClip, path: Path) -> StoredVideo:
        frames: Iterator[np.ndarray] = (
            iter(clip.frames)
            if clip.frames is not None
            else iter_frames(clip.path, fps=clip.rate, limits=self.config.video())
        )
        first = next(frames, None)
        if first is None:
            raise VideoError(f"{clip.path}: holds no frame")
        written = encode(
            path,
            chain([first], frames),
            fps=clip.rate,
            crf=self.config.crf,
            gop=self.config.gop,
            preset=self.config.preset,
        )
        height, width = first.shape[:2]
        return StoredVideo(
            path=path,
            num_frames=written.num_frames,
            fps=float(clip.rate),
            # An odd side was padded: what was 1 is a little less of the stored frame.
            scale=np.array([width / written.width, height / written.height], np.float32),
        )

    def _members(
        self, source: SourceRecord, stored: StoredVideo, pose: PoseTrack, faces: FaceTrack
    ) -> dict[str, Path]:
        """The clip's members as files beside its video."""
        clip = source.clips[0]
        pose_arrays = {
            "keypoints": pose.keypoints.astype(np.float32),
            "score": pose.score.astype(np.float32),
            "boxes": pose.boxes.astype(np.float32),
            "track_ids": np.arange(pose.num_people, dtype=np.int32),
            "model": np.array(pose.backend),
        }
        face_arrays = {
            "boxes": faces.boxes,
            "landmarks": faces.landmarks,
            "score": faces.score,
            "embeddings": faces.embeddings,
            "model": np.array(faces.model),
            "channel_order": np.array(faces.channel_order),
        }
        schema.check_pose(pose_arrays, clip.num_frames, clip.key)
        schema.check_faces(face_arrays, clip.num_frames, clip.key)
        described = {
            "key": clip.key,
            "source": {
                "id": source.id,
                "sha256": source.sha256,
                "bytes": source.bytes,
                "info": source.info,
            },
            "span": [clip.start, clip.end],
            "fps": clip.fps,
            "num_frames": clip.num_frames,
            "size": [clip.height, clip.width],
            "scores": clip.scores,
            "provenance": {"uris": source.uris, **source.provenance},
            "models": self.describe(),
            "config_hash": self.config_hash,
            "versions": versions(),
        }
        files = {
            "pose.npz": schema.pack_arrays(pose_arrays),
            "face.npz": schema.pack_arrays(face_arrays),
            "json": schema.encode_json(described),
        }
        members = {f"{clip.key}.mp4": stored.path}
        for suffix, data in files.items():
            path = stored.path.with_name(f"{clip.key}.{suffix}")
            path.write_bytes(data)
            members[path.name] = path
        return members


def failed_record(item: ImportItem, error: str) -> SourceRecord:
    """The record of an item that could not be taken over."""
    return SourceRecord(
        id=item.id,
        sha256="",
        bytes=item.bytes,
        uris=(item.uri,),
        verdict="failed",
        reasons=("unreadable",),
        error=error[:_ERROR_LENGTH],
    )


def _scores(clip: OpenClip, stored: StoredVideo, pose: PoseTrack, faces: FaceTrack) -> Scores:
    """What can be said without judging: sizes, and the shares of keypoints and faces."""
    seen = (faces.score > 0).any(axis=1).mean() if faces.score.size else 0.0
    return {
        "seconds": round(stored.num_frames / stored.fps, 6),
        "width": clip.info["width"],
        "height": clip.info["height"],
        "fps": round(stored.fps, 6),
        "pose_missing": round(pose.missing_share(), 6),
        "people": pose.num_people,
        "face_share": round(float(seen), 6),
        "pose_backend": pose.backend,
    }


def _thumbnail(stored: StoredVideo, pose: PoseTrack, faces: FaceTrack) -> Path:
    middle = stored.num_frames // 2
    frame = next(iter_frames(stored.path, start=(middle + 0.5) / stored.fps, fps=stored.fps))
    one = slice(middle, middle + 1)
    people = replace(
        pose, keypoints=pose.keypoints[one], score=pose.score[one], boxes=pose.boxes[one]
    )
    seen = [Face(box=box, score=1.0) for box in faces.boxes[middle] if (box[2:] > box[:2]).all()]
    path = stored.path.with_suffix(".jpg")
    path.write_bytes(encode_jpeg(draw_thumbnail(frame, people, seen)))
    return path


def _is_of_machine(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in _MACHINE_ERRORS:
            return True
        error = error.__cause__
    return False
