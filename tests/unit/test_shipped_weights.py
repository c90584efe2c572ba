"""The alignment weights that ship: complete, under known terms, and better than no weights."""

import hashlib

import torch

from animator.alignment_weights import open_alignment, shipped_alignment
from animator.similarity import Similarity, apply, fit
from tests.unit.test_motion import write_motion
from training.align import AlignConfig


def test_the_shipped_block_loads_under_named_terms():
    block, about = open_alignment("shipped")
    assert block is not None
    assert not block.training
    digest = hashlib.sha256((shipped_alignment() / "alignment.safetensors").read_bytes())
    assert about["sha256"] == digest.hexdigest()[:12]
    licence = about["licence"] or ""
    assert licence.startswith("non-commercial use only")
    assert "CC BY-NC 4.0 (Bandai-Namco Research Motion Dataset)" in licence


def test_its_card_lies_beside_it():
    folder = shipped_alignment()
    assert {path.name for path in folder.iterdir()} == {
        "MODEL_CARD.md", "alignment.safetensors", "config.json", "curve.svg",
    }  # fmt: skip
    card = (folder / "MODEL_CARD.md").read_text()
    block, _ = open_alignment("shipped")
    assert block is not None
    assert f"{sum(p.numel() for p in block.parameters()):,} parameters" in card
    assert "--recipe alignment_motion" in card
    assert "**These weights are for non-commercial use**" in card
    assert (folder / "curve.svg").read_text().startswith("<svg")


@torch.no_grad()
def test_it_aligns_motion_it_has_not_seen_better_than_the_closed_form(tmp_path):
    motion = write_motion(tmp_path / "motion")  # made up: no data set has it
    batch = AlignConfig(motion=str(motion)).build_task(seed=0).batch(range(256))
    block, _ = open_alignment("shipped")
    assert block is not None
    flat = (batch["driven"].flatten(0, 1), batch["weight"].flatten(0, 1))
    reference, frame = (
        batch[name].repeat_interleave(batch["driven"].shape[1], 0)
        for name in ("reference", "frame")
    )

    def distance(transform: Similarity) -> float:
        moved, target, visible = (
            batch[name].flatten(0, 1) for name in ("moved", "target", "visible")
        )
        off = (apply(transform, moved) - target).norm(dim=-1) * visible
        return float(off.sum() / visible.sum())

    learned = distance(block(reference, *flat, frame).transform)
    closed_form = distance(fit(flat[0], reference, flat[1]))
    assert learned < 0.9 * closed_form
