"""The alignment block on held-out poses: the rows of the paper's Dis, and pictures of a few.

Shapes: B examples, F driven frames, N = 18 keypoints of the body. Coordinates are isotropic
(`animator.keypoints`).
"""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from animator.keypoints import from_isotropic
from animator.similarity import apply
from animator.skeleton import draw_pose
from pipelines.shards import write_atomic
from training.align import AlignTask

_EXAMPLES = 32  # of each clip
_PICTURES, _SIDE = 6, 256  # on the sheet, and pixels of the longer side of one
# What the loss calls the distances, and what they are in the table.
ROWS = {
    "distance_none": "dis_none",
    "distance_closed_form": "dis_similarity",
    "distance": "dis_learned",
    "distance_clip": "dis_learned_clip",
}


@torch.no_grad()
def validate(
    task: AlignTask, model: nn.Module, folder: Path, device: torch.device, clips: int
) -> dict[str, float]:
    """Metrics on poses that are never trained on; none where nothing is held out.

    `loss` is that of training; the rows of Dis are mean distances to the poses as they were, of
    the longer side: without alignment, by the closed form, by the learned block, and by one
    learned transform for all frames of an example. `folder` gets `contact.png`: reference |
    misaligned | aligned | truth.
    """
    pairs = task.config.held_out_pairs()
    if pairs is None:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    training = model.training
    model.to(device).eval()
    batch = {k: v.to(device) for k, v in pairs.batch(range(clips * _EXAMPLES)).items()}
    loss, numbers = task.loss(model, batch)
    few = {name: value[: _PICTURES * _EXAMPLES : _EXAMPLES] for name, value in batch.items()}
    write_atomic(folder / "contact.png", _sheet(model, few))
    model.train(training)
    return {"loss": float(loss), **{row: float(numbers[name]) for name, row in ROWS.items()}}


def _sheet(model: Any, batch: dict[str, Tensor]) -> bytes:
    """PNG of the first driven frame of each example."""
    driven, weight = batch["driven"][:, 0], batch["weight"][:, 0]
    transform = model(batch["reference"], driven, weight, batch["frame"])[0]
    seen = batch["visible"][:, 0]
    columns = (
        (batch["reference"], weight),
        (batch["moved"][:, 0], seen),
        (apply(transform, batch["moved"][:, 0]), seen),
        (batch["target"][:, 0], seen),
    )
    rows = [
        np.concatenate(
            [
                _draw(points[i], score[i], batch["frame"][i])
                for points, score in ((p.cpu(), s.cpu()) for p, s in columns)
            ],
            axis=1,
        )
        for i in range(len(driven))
    ]
    done, png = cv2.imencode(".png", np.concatenate(rows)[..., ::-1])
    assert done
    return png.tobytes()


def _draw(points: Tensor, score: Tensor, frame: Tensor) -> np.ndarray:
    """A pose `(N, 2)` on a square, its frame in the middle with a grey edge."""
    height, width = (max(1, round(float(side) * _SIDE)) for side in frame)
    keypoints = from_isotropic(points.float().numpy(), width, height)
    # All that is seen counts as sure, so that it shows.
    drawn = draw_pose(keypoints, (score > 0).float().numpy(), height, width)
    cv2.rectangle(drawn, (0, 0), (width - 1, height - 1), (90, 90, 90), 1)
    square = np.zeros((_SIDE, _SIDE, 3), np.uint8)
    top, left = (_SIDE - height) // 2, (_SIDE - width) // 2
    square[top : top + height, left : left + width] = drawn[:_SIDE, :_SIDE]
    return square
