"""The poses that pose alignment is measured on, by name."""

import difflib
from dataclasses import dataclass, field, replace

from animator.keypoints import SimilarityRange
from pipelines.motion_camera import FULL_BODIES, CameraConfig


@dataclass(frozen=True, kw_only=True)
class AlignmentSetting:
    """How clips are drawn and misaligned."""

    about: str
    cameras: tuple[CameraConfig, ...] = (FULL_BODIES,)  # one a person of the frame
    misalignment: SimilarityRange = field(default_factory=SimilarityRange)
    mirrored: bool = False  # the driving clip is mirrored against the reference


DEFAULT_SETTING = "full"
_WIDE = replace(FULL_BODIES, aspect=(16 / 9, 16 / 9))
SETTINGS = {
    "full": AlignmentSetting(about="whole people, every joint visible, hardly leaving their place"),
    "short": AlignmentSetting(
        about="the same over clips of 2 to 6 seconds",
        cameras=(replace(FULL_BODIES, span=(2.0, 6.0)),),
    ),
    "half": AlignmentSetting(
        about="half bodies", cameras=(replace(FULL_BODIES, full_body=0.0, body=(0.45, 0.65)),)
    ),
    "close": AlignmentSetting(
        about="close-ups: head and shoulders",
        cameras=(replace(FULL_BODIES, full_body=0.0, body=(0.22, 0.4)),),
    ),
    "missing": AlignmentSetting(
        about="30 % of the joints missing in each frame",
        cameras=(replace(FULL_BODIES, perfect=0.0, hide_joints=0.3, hide_parts=0.0, noise=0.0),),
    ),
    "noisy": AlignmentSetting(
        about="joints found with a deviation of 2 % of the person's height",
        cameras=(replace(FULL_BODIES, perfect=0.0, hide_joints=0.0, hide_parts=0.0, noise=0.02),),
    ),
    "turned": AlignmentSetting(
        about="the camera goes up to half way round the person during the clip",
        cameras=(replace(FULL_BODIES, turn=(-180.0, 180.0)),),
    ),
    "mirrored": AlignmentSetting(
        about="the driving clip is mirrored against the reference", mirrored=True
    ),
    "walking": AlignmentSetting(
        about="people who walk through the frame and out of it",
        cameras=(replace(FULL_BODIES, walk=1.0),),
    ),
    "several": AlignmentSetting(
        about="two people side by side under one misalignment, each aligned to itself",
        cameras=(replace(_WIDE, strip=(0.0, 0.5)), replace(_WIDE, strip=(0.5, 1.0))),
    ),
    "aligned": AlignmentSetting(
        about="poses that need no alignment",
        misalignment=SimilarityRange(scale=1.0, rotation=0.0, shift=0.0),
    ),
}

# Of recorded poses, which bring people, cameras and detectors of their own.
RECORDED = AlignmentSetting(about="recorded 2-D poses as they are", cameras=())


def named_settings(name: str) -> dict[str, AlignmentSetting]:
    """The setting of that name, or every one for `all`.

    Raises:
        ValueError: for an unknown name; names the nearest one.
    """
    if name == "all":
        return dict(SETTINGS)
    if name not in SETTINGS:
        near = difflib.get_close_matches(name, SETTINGS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"There is no setting {name!r}; there are {', '.join(SETTINGS)} and all.{hint}"
        )
    return {name: SETTINGS[name]}
