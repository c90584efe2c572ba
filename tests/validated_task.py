"""The toy task with held-out data, in a module that validation's own process can import."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from tests.toy_task import ToyConfig, ToyTask, toy_config
from training.config import TrainConfig, ValidateConfig


class ValidatedTask(ToyTask):
    name = "validated"

    def validate(
        self, model: nn.Module, folder: Path, device: torch.device, clips: int
    ) -> Mapping[str, float]:
        config = self.config
        assert isinstance(config, ValidatedConfig)
        samples = int(folder.name.rpartition("-")[2])
        if samples == config.fails_at:
            raise RuntimeError("the validation does not work")
        time.sleep(config.takes)
        if not config.holds_out:
            return {}
        Image.new("RGB", (320, 80), (samples % 255, 120, 90)).save(folder / "contact.png")
        held_out = range(10_000, 10_000 + clips)
        return {"loss": float(self.loss(model, self.batch(held_out))[0]), "never": float("nan")}

    def save_model(self, state: dict[str, Tensor], folder: Path) -> None:
        super().save_model(state, folder)
        (folder / "config.json").write_text("{}")


@dataclass(frozen=True, kw_only=True)
class ValidatedConfig(ToyConfig):
    name: ClassVar[str] = "validated"
    may_change: ClassVar[tuple[str, ...]] = (*ToyConfig.may_change, "fails_at", "takes")

    fails_at: int = -1
    takes: float = 0.0
    holds_out: bool = True

    def build_task(self, seed: int, global_batch: int = 1) -> ValidatedTask:
        return ValidatedTask(self, seed)


def validated_config(
    *,
    every: int = 32,
    metric: str = "loss",
    higher_is_better: bool = False,
    track: bool = False,
    workers: int = 1,
    **task: object,
) -> TrainConfig:
    """A run of 96 samples with checkpoints, and a step that takes long enough to be seen."""
    base = toy_config(every=32, track=track, workers=workers)
    return replace(
        base,
        task=ValidatedConfig(**task),  # type: ignore[arg-type]
        checkpoint=replace(base.checkpoint, keep=8),
        validate=ValidateConfig(
            every_samples=every, clips=16, metric=metric, higher_is_better=higher_is_better
        ),
    )
