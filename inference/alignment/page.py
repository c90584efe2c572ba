"""The page of an alignment: its numbers, pictures, curves and strip in one file of HTML.

Shapes: T frames, P people, K keypoints, H W pixels.
"""

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from inference.alignment import pictures
from inference.alignment.curves import draw_curves
from inference.alignment.methods import (
    AFFINE,
    CLOSED_FORM,
    LEARNED,
    NONE,
    MethodResult,
    OwnTransforms,
)
from inference.perception import Pose
from inference.retarget import Retargeted

STRIP = 10  # pictures of the result over time
TITLES = {
    NONE: "not aligned",
    AFFINE: "affine",
    CLOSED_FORM: "closed form",
    LEARNED: "learned",
}
_TEMPLATE = "report.html.jinja"


def render_page(
    result: Mapping[str, Any],
    reference: tuple[np.ndarray, Pose],
    driving: tuple[Sequence[np.ndarray], Pose],
    methods: Mapping[str, MethodResult],
    own: Sequence[OwnTransforms],
) -> str:
    """The page; all text is escaped.

    Args:
        result: what `inference.alignment.report` found, in numbers.
        reference: the picture `(H, W, 3)` and its people `(P, K, 2)`.
        driving: T frames `(H, W, 3)` and their people `(T, P, K, 2)`.
        methods: by name; the last is the one that is used.
        own: what every frame alone says, for each person aligned.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["signed"] = _signed
    source = resources.files("inference.alignment").joinpath(_TEMPLATE).read_text("utf-8")
    used = methods[result["used"]].moved
    return environment.from_string(source).render(
        result=result,
        titles=TITLES,
        rows=_grid(result, reference, driving, methods),
        strip=_strip(reference, driving[1], used, result["driving"]["fps"]),
        curves=[
            draw_curves(transforms, person)
            for transforms, person in zip(own, used.people, strict=True)
        ],
    )


def _signed(value: float, digits: int = 1) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _grid(
    result: Mapping[str, Any],
    reference: tuple[np.ndarray, Pose],
    driving: tuple[Sequence[np.ndarray], Pose],
    methods: Mapping[str, MethodResult],
) -> list[dict[str, Any]]:
    """A row a frame: the driving frame, and what every method makes of it."""
    frames, poses = driving
    shown = [frame["frame"] for frame in result["shown"]]
    who = [person.driving for person in methods[result["used"]].moved.people]
    seen = poses.score[shown][:, who] >= poses.threshold
    points = [method.moved.keypoints[shown][:, who][seen] for method in methods.values()]
    canvas = pictures.make_canvas(reference[0], np.concatenate(points))
    canvas = pictures.with_reference(canvas, reference[1])
    rows = []
    for at, index in zip(result["shown"], shown, strict=True):
        score = (poses.score[index], poses.threshold)
        beside = pictures.draw_frame(frames[index], poses.keypoints[index], *score, canvas.size[0])
        drawn = {
            name: pictures.draw_on(canvas, method.moved.keypoints[index], *score, who)
            for name, method in methods.items()
        }
        rows.append(
            {
                "at": at,
                "driving": pictures.embed(beside),
                "methods": {name: pictures.embed(image) for name, image in drawn.items()},
            }
        )
    return rows


def _strip(
    reference: tuple[np.ndarray, Pose], driving: Pose, moved: Retargeted, fps: float
) -> list[dict[str, Any]]:
    """The result over time, evenly spread."""
    chosen = pictures.spread_over(len(moved.keypoints), STRIP)
    who = [person.driving for person in moved.people]
    seen = driving.score[chosen][:, who] >= driving.threshold
    side = round(pictures.TILE * pictures.SMALL)
    canvas = pictures.make_canvas(reference[0], moved.keypoints[chosen][:, who][seen], side)
    canvas = pictures.with_reference(canvas, reference[1])
    strip = []
    for index in chosen:
        pose = (moved.keypoints[index], driving.score[index], driving.threshold)
        picture = pictures.embed(pictures.draw_on(canvas, *pose, who))
        strip.append({"seconds": index / fps, "picture": picture})
    return strip
