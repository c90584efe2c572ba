"""Which pose backend is used: a file beside the source, the best networks present, or none."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from animator.keypoints import VISIBLE
from pipelines.models import ENVIRONMENT, locate_pose_models
from pipelines.pose import PoseBackend, PoseError, PoseTrack
from pipelines.pose_file import FilePoseBackend


class AutoPoseBackend:
    """Keypoints from a file where one lies beside the source, else from `network`, else none."""

    def __init__(self, network: PoseBackend | None):
        self._file = FilePoseBackend()
        self._network = network
        self.name = "auto"
        self.licence = "that of the keypoints file" if network is None else network.licence
        self.threshold = VISIBLE
        fallback = "no keypoints: no pose models were found" if network is None else network.reason
        self.reason = f"keypoints beside the source where they lie there, else {fallback}"

    def track(
        self,
        frames: Sequence[np.ndarray],
        *,
        source: Path | None = None,
        times: np.ndarray | None = None,
        rate: float | None = None,
    ) -> PoseTrack:
        """People of one clip; the track's `backend` says who found them."""
        if self._file.find(source) is not None:
            return self._file.track(frames, source=source, times=times, rate=rate)
        if self._network is not None:
            return self._network.track(frames, source=source, times=times, rate=rate)
        return PoseTrack.empty(len(frames), backend="none")


def open_pose_backend(choice: str = "auto", *, threads: int = 2) -> PoseBackend:
    """The backend for `auto`, `onnx` (best pair present), `dwpose` or `file`.

    Raises PoseError for an unknown choice or models that are not there.
    """
    if choice == "file":
        return FilePoseBackend()
    if choice not in ("auto", "onnx", "dwpose"):
        raise PoseError(f"pose backend {choice!r}; expected auto, onnx, dwpose or file")
    models = locate_pose_models("dwpose" if choice == "dwpose" else None)
    if models is None:
        if choice == "auto":
            return AutoPoseBackend(None)
        wanted = "DWPose network" if choice == "dwpose" else "pose network"
        raise PoseError(
            f"no person detector and {wanted} were found; put them in a folder pose/ below "
            f"{ENVIRONMENT}, or give keypoints beside the video"
        )
    # Loaded where it is used: a file of keypoints needs no network runtime.
    from pipelines.pose_onnx import OnnxPoseBackend

    network = OnnxPoseBackend(
        models.detector,
        models.pose,
        licence=models.licence,
        threads=threads,
        reason=f"the best pose models found: {models.detector.name} and {models.pose.name}",
    )
    return AutoPoseBackend(network) if choice == "auto" else network
