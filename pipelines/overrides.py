"""Frozen dataclass configs as text: `a.b=c` overrides, plain dictionaries, a stable hash.

One set of rules serves curation, training and the readers of stored records. Unknown keys and
wrong types are errors that name the nearest key and the type that was expected.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

Config = TypeVar("Config")

_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}
_NONE = {"none", "null"}


class ConfigError(ValueError):
    """A setting that does not exist or has a value of the wrong type."""


def apply_overrides(config: Config, assignments: Sequence[str]) -> Config:
    """A copy of `config` with every `a.b=c` applied; the later of two for one key wins.

    All assignments to one dataclass are applied together, so that a pair of settings that
    belong together (a minimum and a maximum) may be given in any order.

    Raises:
        ConfigError: no `=`, an unknown key, a wrong type.
        ValueError: whatever the dataclasses' own checks say.
    """
    tree: dict[str, Any] = {}
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        path = path.strip()
        if not separator or not path:
            raise ConfigError(f"got {assignment!r}, expected KEY=VALUE such as output.fps=25.")
        node = tree
        *parents, leaf = path.split(".")
        for name in parents:
            child = node.setdefault(name, {})
            if not isinstance(child, dict):
                raise ConfigError(f"{path}: {name} is given a value and a part of it at once.")
            node = child
        if isinstance(node.get(leaf), dict):
            raise ConfigError(f"{path}: {leaf} is given a value and a part of it at once.")
        node[leaf] = text.strip()
    return _apply(config, tree, "")


def to_dict(config: Any) -> Any:
    """Dataclasses as plain dictionaries, lists, numbers and text that JSON can hold."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {
            field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)
        }
    if isinstance(config, Mapping):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [to_dict(value) for value in config]
    if isinstance(config, Enum):
        return config.value
    if isinstance(config, Path):
        return str(config)
    return config


def from_dict(cls: type[Config], data: Mapping[str, Any]) -> Config:
    """Build the dataclass `cls` from what `to_dict` gave; fields left out keep their defaults.

    Raises:
        ConfigError: unknown keys, missing keys without a default, wrong types.
    """
    return _build(cls, data, "")


def config_hash(config: Any) -> str:
    """SHA-256 (hex) of the config's sorted JSON; equal configs have equal hashes."""
    text = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(before: Any, after: Any, prefix: str = "") -> list[str]:
    """Readable lines `a.b: 1 → 2` for every leaf in which two `to_dict` results differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        lines = []
        for key in sorted(before.keys() | after.keys()):
            path = f"{prefix}.{key}" if prefix else key
            lines += differences(before.get(key), after.get(key), path)
        return lines
    return [] if before == after else [f"{prefix}: {before!r} → {after!r}"]


def _apply(config: Any, tree: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(type(config))
    names = _field_names(type(config))
    changes = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if name not in names:
            raise _unknown(path, name, names, prefix)
        current = getattr(config, name)
        if isinstance(value, dict):
            if not dataclasses.is_dataclass(current):
                raise ConfigError(f"{path} is a single value and has no part {min(value)!r}.")
            changes[name] = _apply(current, value, f"{path}.")
        elif dataclasses.is_dataclass(current):
            inner = ", ".join(_field_names(type(current)))
            raise ConfigError(f"{path} is a group; set one of its parts: {inner}.")
        else:
            changes[name] = _parse(hints[name], value, path)
    return dataclasses.replace(config, **changes)


def _parse(kind: Any, text: str, path: str) -> Any:
    """The value that the text of an assignment stands for, of the annotated type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    lowered = text.lower()
    if origin in (Union, types.UnionType):
        if type(None) in args and lowered in _NONE:
            return None
        for option in (option for option in args if option is not type(None)):
            try:
                return _parse(option, text, path)
            except ConfigError:
                continue
    elif origin is Literal:
        for option in args:
            if text == str(option):
                return option
    elif kind is bool:
        if lowered in _TRUE | _FALSE:
            return lowered in _TRUE
    elif kind is str:
        return text
    elif origin in (tuple, list, dict) or kind in (tuple, list, dict):
        return _build(kind, _parse_sequence(kind, text, path), path)
    elif kind in (int, float):
        try:
            return _build(kind, kind(text.replace("_", "")), path)
        except ValueError:
            pass
    elif isinstance(kind, type) and issubclass(kind, Enum | Path):
        return _build(kind, text, path)
    raise _wrong(path, text, kind)


def _parse_sequence(kind: Any, text: str, path: str) -> Any:
    """`[1, 2]` and `{"a": 1}` as JSON, `1,2` by commas."""
    if text.startswith(("[", "{")):
        try:
            return json.loads(text)
        except ValueError:
            raise _wrong(path, text, kind) from None
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict or kind is dict:
        raise _wrong(path, text, kind)
    parts = [part.strip() for part in text.strip("()").split(",") if part.strip()]
    item_kinds = _item_kinds(origin, args, len(parts)) or [str] * len(parts)
    return [_parse(item, part, path) for item, part in zip(item_kinds, parts, strict=True)]


def _build(kind: Any, value: Any, path: str) -> Any:
    """The value a JSON value stands for, of the annotated type."""
    if kind is Any or kind is object:
        return value
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _build_union(args, value, path)
    if origin is Literal:
        for option in args:
            if value == option and type(value) is type(option):
                return option
        raise _wrong(path, value, kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _build_dataclass(kind, value, path)
    if origin is dict or kind is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise _wrong(path, value, kind)
        item = args[1] if args else Any
        return {key: _build(item, entry, f"{path}.{key}") for key, entry in value.items()}
    if origin in (tuple, list) or kind in (tuple, list):
        if not isinstance(value, tuple | list):
            raise _wrong(path, value, kind)
        item_kinds = _item_kinds(origin, args, len(value))
        if item_kinds is None:
            raise _wrong(path, value, kind)
        items = [_build(item, entry, path) for item, entry in zip(item_kinds, value, strict=True)]
        return tuple(items) if (origin or kind) is tuple else items
    return _build_scalar(kind, value, path)


def _build_scalar(kind: Any, value: Any, path: str) -> Any:
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isnan(value):
            raise _wrong(path, value, kind)
        return float(value)
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind in (str, bool) and isinstance(value, kind):
        return value
    if kind is type(None) and value is None:
        return None
    if isinstance(kind, type) and issubclass(kind, Path) and isinstance(value, str | Path):
        return Path(value)
    if isinstance(kind, type) and issubclass(kind, Enum):
        try:
            return kind(value)
        except ValueError:
            pass
    raise _wrong(path, value, kind)


def _build_union(args: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in args:
        return None
    error: ValueError | None = None
    for option in (option for option in args if option is not type(None)):
        try:
            return _build(option, value, path)
        except ValueError as failure:
            error = error or failure
    raise error or _wrong(path, value, Union[args])  # noqa: UP007


def _build_dataclass(cls: Any, value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(path, value, cls)
    prefix = f"{path}." if path else ""
    names = _field_names(cls)
    for name in value:
        if name not in names:
            raise _unknown(f"{prefix}{name}", name, names, prefix)
    hints = typing.get_type_hints(cls)
    built = {name: _build(hints[name], entry, f"{prefix}{name}") for name, entry in value.items()}
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.init
        and field.name not in built
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{prefix}{missing[0]} is missing.")
    return cls(**built)


def _item_kinds(origin: Any, args: tuple[Any, ...], length: int) -> list[Any] | None:
    """The type of each item of a sequence of that length; None where the length is wrong."""
    if not args:
        return [Any] * length
    if origin is list or args[-1] is Ellipsis:
        return [args[0]] * length
    return list(args) if len(args) == length else None


def _field_names(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls) if field.init]


def _unknown(path: str, name: str, names: Sequence[str], prefix: str) -> ConfigError:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return ConfigError(f"{path} is not a setting. Did you mean {prefix}{near[0]}?")
    return ConfigError(f"{path} is not a setting. Known here: {', '.join(sorted(names))}.")


def _wrong(path: str, value: Any, kind: Any) -> ConfigError:
    return ConfigError(f"{path} got {value!r}, expected {_describe(kind)}.")


def _describe(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(str(option) for option in args)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in args)
    if kind is type(None):
        return "none"
    if origin in (tuple, list):
        return (
            "values separated by commas ("
            + ", ".join("…" if option is Ellipsis else _describe(option) for option in args)
            + ")"
        )
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return plain.get(kind, getattr(kind, "__name__", str(kind)))
