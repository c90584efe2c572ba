"""The record beside a video: what was changed is named, and no path of a key."""

import json
from dataclasses import replace
from pathlib import Path

from inference.presets import preset
from inference.provenance import ProvenanceConfig
from inference.records import describe_preset
from inference.settings import AnimationSettings

OWN = AnimationSettings()


def test_changed_settings_are_named_with_and_without_a_preset():
    used = replace(OWN, sampling=replace(OWN.sampling, churn=40.0))
    for name in (None, "fast"):
        found = describe_preset(preset(name) if name else None, OWN, used)
        changed = found["preset"]["changed"] if name else found["changed"]
        (text,) = changed
        assert text.startswith("sampling.churn")
    assert describe_preset(None, OWN, OWN) == {"changed": []}


def test_a_record_never_says_where_keys_lie(tmp_path: Path):
    marks = ProvenanceConfig(
        certificate=tmp_path / "chain.pem", key=tmp_path / "key.pem", watermark="made"
    )
    found = describe_preset(preset("fast"), OWN, replace(OWN, provenance=marks))
    assert str(tmp_path) not in json.dumps(found)
    assert any(text.startswith("provenance.c2pa") for text in found["preset"]["changed"])
