"""Perception that remembers: what was seen in a picture or clip is not looked for again.

The poses of a video cost more than anything else that is done before sampling, and a batch drives
many pictures by one clip. What is remembered belongs to the content of a file and of the keypoints
beside it, never to its path alone, so a file that is changed in between is looked at anew.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from inference.perception import AnimationError, Perception, Pose
from pipelines.faces import Face, FaceBackend
from pipelines.pose_file import FilePoseBackend
from pipelines.shards import sha256_file
from pipelines.video import VideoInfo

Found = TypeVar("Found")
_MOST_DIGESTS = 1000


class RememberingPerception(Perception):
    """`Perception` with a memory of its last answers; refusals are remembered like the rest.

    Args:
        keep: answers that are kept; the one that was not asked for the longest goes first. A pose
            takes 5 MB where it has one person of 128 points in 3000 frames.
        face, pose, faces: see `Perception`.

    `hits` counts by kind (face, reference, driving, cuts) what was not looked for again.
    """

    def __init__(
        self,
        face: str = "auto",
        pose: str = "auto",
        faces: FaceBackend | None = None,
        *,
        keep: int,
    ):
        super().__init__(face, pose, faces)
        self.hits: Counter[str] = Counter()
        self._keep = keep
        self._answers: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._digests: dict[tuple[Any, ...], str] = {}

    def face(self, path: Path, image: np.ndarray, chosen: int) -> Face | None:
        """See `Perception.face`."""
        key = ("face", *self._content(path), chosen)
        return self._remembered(
            key, lambda: super(RememberingPerception, self).face(path, image, chosen)
        )

    def reference(self, path: Path, image: np.ndarray, face: Face | None) -> Pose:
        """See `Perception.reference`."""
        box = None if face is None else face.box.tobytes()
        key = ("reference", *self._content(path), box)
        return self._remembered(
            key, lambda: super(RememberingPerception, self).reference(path, image, face)
        )

    def frames(self, path: Path, info: VideoInfo) -> Sequence[np.ndarray]:
        """See `Perception.frames`; none of them where `driving` needs none."""
        if self._driving_key(path, info) in self._answers:
            return ()
        return super().frames(path, info)

    def driving(self, path: Path, info: VideoInfo, frames: Sequence[np.ndarray]) -> Pose:
        """See `Perception.driving`."""
        return self._remembered(
            self._driving_key(path, info),
            lambda: super(RememberingPerception, self).driving(path, info, frames),
        )

    def cuts(self, path: Path, info: VideoInfo) -> tuple[float, ...]:
        """See `Perception.cuts`."""
        key = ("cuts", str(path), self._digest(path))
        return self._remembered(key, lambda: super(RememberingPerception, self).cuts(path, info))

    def _driving_key(self, path: Path, info: VideoInfo) -> tuple[Any, ...]:
        return ("driving", *self._content(path), info)

    def _remembered(self, key: tuple[Any, ...], find: Callable[[], Found]) -> Found:
        answer: Any
        if key in self._answers:
            self.hits[str(key[0])] += 1
            self._answers.move_to_end(key)
            answer = self._answers[key]
        else:
            try:
                answer = find()
            except AnimationError as error:
                answer = error
            self._answers[key] = answer
            while len(self._answers) > self._keep:
                self._answers.popitem(last=False)
        if isinstance(answer, AnimationError):
            raise AnimationError(str(answer))
        return answer

    def _content(self, path: Path) -> tuple[Any, ...]:
        """What decides the answers about a file.

        Its path is among it, since messages and records name it: a copy's answer has its own name.
        """
        sidecar = FilePoseBackend.find(path)
        digests = [self._digest(path)]
        if sidecar is not None:
            digests += [sidecar.name, self._digest(sidecar)]
        return (str(path), *digests)

    def _digest(self, path: Path) -> str:
        """SHA-256 of a file, read once as long as its size and time stay."""
        state = path.stat()
        key = (str(path), state.st_size, state.st_mtime_ns, state.st_ino)
        if key not in self._digests:
            if len(self._digests) >= _MOST_DIGESTS:
                self._digests.clear()
            self._digests[key] = sha256_file(path)
        return self._digests[key]
