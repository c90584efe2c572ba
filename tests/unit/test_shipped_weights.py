"""The alignment weights that ship: complete, under known terms, and better than no weights."""

import hashlib

from animator.alignment_weights import open_alignment, shipped_alignment


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
