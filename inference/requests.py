"""What one animation is asked to be: the options, the request, and a manifest of many requests."""

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.shards import sha256_file

MAX_SEED = 2**32 - 1
MAX_STEPS = 200
MAX_GUIDANCE = 30.0
MAX_FACES = 100
MAX_NAME_BYTES = 200  # leaves room for the suffixes of records within the usual 255
OPTION_KINDS = {"seed": int, "steps": int, "guidance": float, "reference_face": int}
MANIFEST_KEYS = ("reference", "driving", "output", *OPTION_KINDS, "id")
POSE_SIDECARS = (".pose.npz", ".dwpose.npz")
SHOWN_PROBLEMS = 10


class RequestError(ValueError):
    """A request that cannot be run; the message says what was given, expected and how to mend."""


@dataclass(frozen=True, kw_only=True)
class AnimationOptions:
    """What a user may choose; None leaves the choice to the model's own default.

    `reference_face` says whom to animate where the picture shows several people: their faces are
    counted from 1, the largest.
    """

    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    reference_face: int = 1

    def __post_init__(self) -> None:
        _check_whole("seed", self.seed, 0, MAX_SEED)
        _check_whole("reference_face", self.reference_face, 1, MAX_FACES)
        if self.steps is not None:
            _check_whole("steps", self.steps, 1, MAX_STEPS)
        if self.guidance is not None and not (
            isinstance(self.guidance, int | float)
            and not isinstance(self.guidance, bool)
            and 0 <= self.guidance <= MAX_GUIDANCE
        ):
            raise RequestError(
                f"guidance is {self.guidance!r}, expected a number from 0 to {MAX_GUIDANCE:g}"
            )

    @classmethod
    def from_text(cls, fields: Mapping[str, str]) -> "AnimationOptions":
        """Options from form fields; an empty field counts as not given. Raises RequestError."""
        given: dict[str, Any] = {}
        for name, kind in OPTION_KINDS.items():
            text = fields.get(name, "").strip()
            if not text:
                continue
            try:
                given[name] = kind(text)
            except ValueError:
                word = "a whole number" if kind is int else "a number"
                raise RequestError(f"{name} is {text[:40]!r}, expected {word}") from None
        return cls(**given)


def _check_whole(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r}, expected a whole number from {low} to {high}")


@dataclass(frozen=True, kw_only=True)
class AnimationRequest(AnimationOptions):
    """Animate the person of `reference` by the motion of `driving`, into the mp4 `output`."""

    reference: Path
    driving: Path
    output: Path

    def to_json(self) -> dict[str, Any]:
        """The request as plain JSON values."""
        paths = {name: str(getattr(self, name)) for name in ("reference", "driving", "output")}
        return {**asdict(self), **paths}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "AnimationRequest":
        """The inverse of `to_json`; raises RequestError for options out of range."""
        paths = {name: Path(data[name]) for name in ("reference", "driving", "output")}
        options = {name: data[name] for name in OPTION_KINDS if name in data}
        return cls(**paths, **options)


@dataclass(frozen=True, kw_only=True)
class ManifestItem:
    """One line of a manifest, checked; `output` is a plain file name that ends in .mp4."""

    line: int
    id: str
    reference: Path
    driving: Path
    output: str
    options: AnimationOptions

    def request(self, output: Path) -> AnimationRequest:
        """The item as a request that writes to `output`."""
        return AnimationRequest(
            reference=self.reference, driving=self.driving, output=output, **asdict(self.options)
        )

    def identity(self, model: str, digests: dict[Path, str]) -> str:
        """SHA-256 over the content of the inputs, the options and the model's fingerprint.

        `digests` remembers the hash of each file, so that shared inputs are read once.
        """
        files = {"reference": self.reference, "driving": self.driving}
        for role, path in tuple(files.items()):
            for suffix in POSE_SIDECARS:
                if path.with_suffix(suffix).is_file():
                    files[role + suffix] = path.with_suffix(suffix)
        for path in files.values():
            if path not in digests:
                digests[path] = sha256_file(path)
        content = {
            "files": {role: digests[path] for role, path in files.items()},
            "options": asdict(self.options),
            "model": model,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> list[ManifestItem]:
    """Every line of a JSONL manifest, all checked before any is returned.

    A line is {"reference": path, "driving": path, "output"?, "seed"?, "steps"?, "guidance"?,
    "reference_face"?, "id"?}; relative paths start at the manifest's folder; empty lines are
    passed over.

    Raises:
        RequestError: names each bad line (the first ten), what was given and what is expected.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RequestError(
            f"{path}: the manifest cannot be read ({error.strerror}); give a JSONL file"
        ) from None
    except UnicodeDecodeError:
        raise RequestError(f"{path}: not UTF-8 text; expected a JSONL manifest") from None
    items: list[ManifestItem] = []
    problems: list[str] = []
    seen: dict[tuple[str, object], int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = _parse_line(line, number, path.parent)
            _refuse_repeats(item, seen)
            items.append(item)
        except RequestError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        shown = problems[:SHOWN_PROBLEMS]
        more = len(problems) - len(shown)
        rest = f"\n  and {more} more" if more else ""
        raise RequestError(
            f"{path}: {len(problems)} bad line(s), nothing was started; mend them and run again\n  "
            + "\n  ".join(shown)
            + rest
        )
    if not items:
        raise RequestError(
            f'{path}: no items; expected lines like {{"reference": "a.png", "driving": "b.mp4"}}'
        )
    return items


def _parse_line(line: str, number: int, folder: Path) -> ManifestItem:
    try:
        data = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        raise RequestError(f"not JSON ({reason}); expected one object a line") from None
    if not isinstance(data, dict):
        raise RequestError(f"{type(data).__name__} given, expected a JSON object in braces")
    for key in data:
        if key not in MANIFEST_KEYS:
            near = difflib.get_close_matches(key, MANIFEST_KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(MANIFEST_KEYS)}"
            raise RequestError(f"unknown key {key[:40]!r}; {hint}")
    reference, driving = (_input_file(data, key, folder) for key in ("reference", "driving"))
    given = {key: data[key] for key in OPTION_KINDS if data.get(key) is not None}
    options = AnimationOptions(**given)
    name = _text(data, "id")
    if name is not None:
        _check_name("id", name)
    output = _text(data, "output")
    if output is None:
        output = f"{name or _default_name(reference, driving, options)}.mp4"
    _check_output(output)
    return ManifestItem(
        line=number,
        id=name or Path(output).stem,
        reference=reference,
        driving=driving,
        output=output,
        options=options,
    )


def _text(data: Mapping[str, Any], key: str) -> str | None:
    value = data.get(key)
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise RequestError(f"{key!r} is {value!r}, expected a text")
    return value


def _input_file(data: Mapping[str, Any], key: str, folder: Path) -> Path:
    text = _text(data, key)
    if text is None:
        raise RequestError(f"{key!r} is missing; give the path of a file")
    path = folder / text
    try:
        found = path.is_file()
    except (OSError, ValueError):
        found = False
    if not found:
        raise RequestError(f"{key!r} is {text!r}, but {str(path)!r} is no file; correct the path")
    return path


def _default_name(reference: Path, driving: Path, options: AnimationOptions) -> str:
    name = f"{reference.stem}-{driving.stem}-{options.seed}"
    if options.steps is not None:
        name += f"-{options.steps}steps"
    if options.guidance is not None:
        name += f"-{options.guidance:g}guidance"
    if options.reference_face != 1:
        name += f"-face{options.reference_face}"
    return name


def _check_output(name: str) -> None:
    _check_name("output", name)
    if not name.endswith(".mp4") or name == ".mp4":
        raise RequestError(f"'output' is {name!r}, expected a name that ends in .mp4")
    stem = name.removesuffix(".mp4").casefold()
    if stem == "batch" or stem.endswith(".error"):
        raise RequestError(f"'output' is {name!r}, a name the batch uses itself; choose another")


def _check_name(key: str, name: str) -> None:
    """A name that stays inside its folder on any system, whatever it holds."""
    if (
        name.startswith(".")
        or name != name.strip()
        or any(char in "/\\:" or ord(char) < 32 or 0xD800 <= ord(char) < 0xE000 for char in name)
    ):
        raise RequestError(
            f"{key!r} is {name!r}, expected a plain file name without folders; "
            "it is written inside --out"
        )
    if len(name.encode()) > MAX_NAME_BYTES:
        raise RequestError(f"{key!r} has {len(name.encode())} bytes, expected ≤ {MAX_NAME_BYTES}")


def _refuse_repeats(item: ManifestItem, seen: dict[tuple[str, object], int]) -> None:
    """Names are compared without case: some file systems do not tell them apart."""
    keys = {
        "output": item.output.casefold(),
        "id": item.id.casefold(),
        "request (reference, driving and options)": (item.reference, item.driving, item.options),
    }
    for what, value in keys.items():
        first = seen.setdefault((what, value), item.line)
        if first != item.line:
            shown = f" {value!r}" if isinstance(value, str) else ""
            raise RequestError(
                f"the same {what}{shown} as line {first}; give it another or remove the line"
            )
