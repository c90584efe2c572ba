"""Settings as text: overrides, dictionaries, hashes, and their errors."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from pipelines.overrides import (
    ConfigError,
    apply_overrides,
    config_hash,
    differences,
    from_dict,
    to_dict,
)


@dataclass(frozen=True, kw_only=True)
class Inner:
    low: float = 0.1
    high: float = 0.9
    mode: Literal["pad", "crop"] = "pad"

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must be under high {self.high}")


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    steps: int = 3
    fast: bool = False
    name: str = "a"
    limit: int | None = None
    size: tuple[int, int] = (4, 4)
    rates: tuple[float, ...] = ()
    folder: Path | None = None


def test_values_take_the_type_of_their_field():
    config = apply_overrides(
        Outer(),
        [
            "inner.low=.5",
            "inner.mode=crop",
            "steps=1_000",
            "fast=true",
            "name=x=y",
            "limit=7",
            "size=8,16",
            "rates=[1, 2.5]",
            "folder=/data",
        ],
    )
    assert config == Outer(
        inner=Inner(low=0.5, mode="crop"),
        steps=1000,
        fast=True,
        name="x=y",
        limit=7,
        size=(8, 16),
        rates=(1.0, 2.5),
        folder=Path("/data"),
    )
    assert apply_overrides(config, ["limit=none"]).limit is None


def test_settings_that_belong_together_come_in_any_order():
    assert apply_overrides(Outer(), ["inner.low=2", "inner.high=3"]).inner == Inner(low=2, high=3)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stepz=3", "Did you mean steps"),
        ("inner.lo=3", "Did you mean inner.low"),
        ("steps=2.5", "expected a whole number"),
        ("fast=maybe", "expected true or false"),
        ("inner.mode=stretch", "one of pad, crop"),
        ("inner.low=nan", "expected a number"),
        ("size=1,2,3", "separated by commas"),
        ("inner=3", "is a group"),
        ("steps.a=3", "single value"),
        ("steps", "KEY=VALUE"),
    ],
)
def test_wrong_settings_say_what_was_expected(assignment, message):
    with pytest.raises(ConfigError, match=message):
        apply_overrides(Outer(), [assignment])


def test_checks_of_the_dataclass_still_run():
    with pytest.raises(ValueError, match="must be under high"):
        apply_overrides(Outer(), ["inner.low=1"])


def test_dictionary_round_trip_and_hash():
    config = apply_overrides(Outer(), ["rates=1,2", "folder=/x"])
    assert from_dict(Outer, to_dict(config)) == config
    assert config_hash(config) == config_hash(from_dict(Outer, to_dict(config)))
    assert config_hash(config) != config_hash(Outer())


@pytest.mark.parametrize("data", [{"stepz": 1}, {"steps": "1"}, {"steps": True}, {"inner": 3}])
def test_stored_settings_are_checked(data):
    with pytest.raises(ConfigError):
        from_dict(Outer, data)


def test_differences_name_the_path_and_both_values():
    lines = differences(to_dict(Outer()), to_dict(apply_overrides(Outer(), ["inner.low=.2"])))
    assert lines == ["inner.low: 0.1 → 0.2"]
