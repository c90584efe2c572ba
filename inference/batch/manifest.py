"""A manifest of many requests: one JSON object a line, all checked before any is begun."""

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from inference.requests import (
    OPTION_KINDS,
    AnimationOptions,
    AnimationRequest,
    RequestError,
    parse_size,
)
from pipelines.framing import MODES
from pipelines.pose_file import FilePoseBackend
from pipelines.shards import sha256_file

KEYS = ("reference", "driving", "output", *OPTION_KINDS, "size", "framing", "id")
MAX_INPUT_BYTES = 4 << 30  # what videos are limited to
MAX_BYTES = 64 << 20
MAX_ITEMS = 100_000
MAX_NAME_BYTES = 200  # leaves room for the suffixes of records within the usual 255
STEM_CHARACTERS = 20  # of each input's name in a name by content
CONTENT_DIGITS = 16
SHOWN_PROBLEMS = 10


@dataclass(frozen=True, kw_only=True)
class ManifestItem:
    """One line of a manifest, checked; `output` is a plain file name that ends in .mp4.

    size, framing: None leaves the choice to the batch.
    digests: SHA-256 of every file that decides the result, by its part.
    """

    line: int
    id: str
    reference: Path
    driving: Path
    output: str
    options: AnimationOptions
    size: tuple[int, int] | None = None
    framing: str | None = None
    digests: Mapping[str, str] = field(default_factory=dict)

    def request(self, output: Path) -> AnimationRequest:
        """The item as a request that writes to `output`."""
        return AnimationRequest(
            reference=self.reference, driving=self.driving, output=output, **asdict(self.options)
        )

    def identity(self, settings: str) -> str:
        """SHA-256 over the content of the inputs, the options and a text of model and settings."""
        content = _content(self.digests, self.options, self.size, self.framing)
        return hashlib.sha256(f"{content} {settings}".encode()).hexdigest()


def read_manifest(path: Path) -> list[ManifestItem]:
    """Every line of a JSONL manifest, all checked before any is returned.

    A line is {"reference": path, "driving": path, "output"?, "seed"?, "steps"?, "guidance"?,
    "reference_face"?, "size"?, "framing"?, "id"?}; relative paths start at the manifest's folder;
    empty lines are passed over. Where no output and no id is given, the output is named by the
    content of the inputs and the options, so that equal names are equal work in any folder.

    Raises:
        RequestError: names each bad line (the first ten), what was given and what is expected.
    """
    path = Path(path)
    items: list[ManifestItem] = []
    problems: list[str] = []
    seen: dict[tuple[str, object], int] = {}
    digests: dict[Path, str] = {}
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        if len(items) + len(problems) == MAX_ITEMS:
            raise RequestError(
                f"{path}: more than {MAX_ITEMS} lines; split the manifest and run the parts one "
                "after another"
            )
        try:
            item = _parse_line(line, number, path.parent, digests)
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


def _read(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise RequestError(
            f"{path}: the manifest cannot be read ({error.strerror}); give a JSONL file"
        ) from None
    if len(data) > MAX_BYTES:
        raise RequestError(
            f"{path}: more than {MAX_BYTES >> 20} MiB; split the manifest and run the parts one "
            "after another"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RequestError(f"{path}: not UTF-8 text; expected a JSONL manifest") from None


def _parse_line(line: str, number: int, folder: Path, digests: dict[Path, str]) -> ManifestItem:
    try:
        data = json.loads(line)
    except RecursionError:
        raise RequestError("not JSON (nested too deeply); expected one object a line") from None
    except ValueError as error:  # not JSON, or a number of thousands of digits
        reason = getattr(error, "msg", "a number that is too long")
        raise RequestError(f"not JSON ({reason}); expected one object a line") from None
    if not isinstance(data, dict):
        raise RequestError(f"{type(data).__name__} given, expected a JSON object in braces")
    for key in data:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(KEYS)}"
            raise RequestError(f"unknown key {key[:40]!r}; {hint}")
    files = {key: _input_file(data, key, folder) for key in ("reference", "driving")}
    given = {key: data[key] for key in OPTION_KINDS if data.get(key) is not None}
    options = AnimationOptions(**given)
    size = _text(data, "size")
    size = None if size is None else parse_size(size)
    framing = _text(data, "framing")
    if framing is not None and framing not in MODES:
        raise RequestError(f"'framing' is {framing[:40]!r}, expected {' or '.join(MODES)}")
    name = _text(data, "id")
    if name is not None:
        _check_name("id", name)
    output = _text(data, "output")
    if output is not None:
        _check_output(output)
    found = _digests(files, digests)
    if output is None:
        content = _content(found, options, size, framing)
        output = f"{name or _content_name(files, content)}.mp4"
        _check_output(output)
    return ManifestItem(
        line=number,
        id=name or Path(output).stem,
        **files,
        output=output,
        options=options,
        size=size,
        framing=framing,
        digests=found,
    )


def _text(data: Mapping[str, Any], key: str) -> str | None:
    value = data.get(key)
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise RequestError(f"{key!r} is {repr(value)[:80]}, expected a text")
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
        raise RequestError(
            f"{key!r} is {text[:200]!r}, but {str(path)[:200]!r} is no file; correct the path"
        )
    if path.stat().st_size > MAX_INPUT_BYTES:
        raise RequestError(
            f"{key!r} is {text[:200]!r}, more than {MAX_INPUT_BYTES >> 30} GiB; give a smaller file"
        )
    return path


def _digests(files: Mapping[str, Path], known: dict[Path, str]) -> dict[str, str]:
    """SHA-256 of the inputs and of the keypoints beside them; `known` has files read before."""
    parts = dict(files)
    for role, path in files.items():
        if sidecar := FilePoseBackend.find(path):
            parts[f"{role}.pose"] = sidecar
    for path in parts.values():
        if path not in known:
            try:
                known[path] = sha256_file(path)
            except OSError as error:
                raise RequestError(f"{path}: cannot be read ({error.strerror})") from None
    return {role: known[path] for role, path in parts.items()}


def _content(
    digests: Mapping[str, str],
    options: AnimationOptions,
    size: tuple[int, int] | None,
    framing: str | None,
) -> str:
    """What makes an item this item and no other, whatever its files are called."""
    content: dict[str, Any] = {"files": dict(digests), "options": asdict(options)}
    content |= {} if size is None else {"size": size}
    content |= {} if framing is None else {"framing": framing}
    return json.dumps(content, sort_keys=True)


def _content_name(files: Mapping[str, Path], content: str) -> str:
    """A name that people recognise and that equal content alone shares."""
    stems = [
        re.sub(r"[^\w-]+", "_", path.stem)[:STEM_CHARACTERS].strip("_") or role
        for role, path in files.items()
    ]
    digest = hashlib.sha256(content.encode()).hexdigest()
    return "-".join([*stems, digest[:CONTENT_DIGITS]])


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
    request = (item.reference, item.driving, item.options, item.size, item.framing)
    keys = {
        "request (reference, driving and options)": request,
        "output": item.output.casefold(),
        "id": item.id.casefold(),
    }
    for what, value in keys.items():
        first = seen.setdefault((what, value), item.line)
        if first != item.line:
            shown = f" {value!r}" if isinstance(value, str) else ""
            raise RequestError(
                f"the same {what}{shown} as line {first}; give it another or remove the line"
            )
