"""Taking model files that were fetched elsewhere into the cache: found by name, copied, verified.

Everything is copied and verified first and moved into place afterwards, so an import takes all that
it found or nothing.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.model_archive import unpack_networks, unpacked_size
from pipelines.model_cache import (
    cache_lock,
    check_disk,
    check_name,
    importing,
    now,
    put,
    record_model,
)
from pipelines.model_catalogue import CATALOGUE, UNKNOWN_LICENCE, KnownModel, ModelError
from pipelines.models import cache_folder, is_face_pack, sha256

MAX_FILES = 100_000  # a folder with more is not one of models
_CHUNK = 1 << 20
_WEIGHTS = (".safetensors", ".pth")
_VIDEO_PIPELINE = "StableVideoDiffusionPipeline"
# What a hub's cache keeps beside the files themselves.
_HOUSEKEEPING = {"blobs", "refs", ".cache", ".git", ".locks", "__MACOSX"}
Progress = Callable[[float, str], None]


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """One file to copy: where it lies, its path in the model, and the digest it must have."""

    source: Path
    path: str
    sha256: str | None


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A model in the folder; `model` is None for a face pack that the catalogue does not know."""

    name: str
    model: KnownModel | None
    pieces: tuple[_Piece, ...]
    missing: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return sum(piece.source.stat().st_size for piece in self.pieces)

    @property
    def zipped(self) -> bool:
        return len(self.pieces) == 1 and self.pieces[0].path.endswith(".zip")


def import_models(
    folder: Path,
    *,
    name: str | None = None,
    catalogue: Sequence[KnownModel] = CATALOGUE,
    progress: Progress = lambda share, stage: None,
) -> dict[str, Any]:
    """Copy the known models of `folder` and its sub folders into the cache.

    Args:
        name: take only this model; one that the catalogue does not know is a face pack, whose
            ONNX files lie in `folder`.
        catalogue: the models that are looked for.
        progress: told the share done (0..1) and the file.

    Returns:
        `imported` (name, path, licence, files with digests), `incomplete` (name, missing files)
        and `unrecognised` (paths of the other files).

    Raises:
        ModelError: there is nothing to take, or a file is not the one that the catalogue knows.
        SourceError: no room, or another pull or import is under way.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder: expected one that holds model files")
    files = _files(folder)
    if name is not None:
        entry = next((model for model in catalogue if model.name == name), None)
        found = [_find_named(name, entry, folder, files)]
    else:
        every = (_find(model, files) for model in catalogue)
        found = [each for each in every if each is not None]
    whole = [each for each in found if not each.missing]
    incomplete = [{"name": e.name, "missing": list(e.missing)} for e in found if e.missing]
    used = {piece.source for each in found for piece in each.pieces}
    unrecognised = [str(f.relative_to(folder)) for f in files if f not in used]
    if not whole:
        raise ModelError(_nothing(folder, incomplete, catalogue))
    with cache_lock(), importing() as work:
        check_disk(sum(each.size * (2 if each.zipped else 1) for each in whole))
        total, done = sum(each.size for each in whole) or 1, 0
        staged = []
        for each in whole:
            progress(done / total, each.name)
            staged.append((each, *_stage(each, work / each.name)))
            done += each.size
        progress(1.0, "verified")
        imported = [_commit(each, path, records, folder) for each, path, records in staged]
    return {"imported": imported, "incomplete": incomplete, "unrecognised": unrecognised}


def _nothing(
    folder: Path, incomplete: list[dict[str, Any]], catalogue: Sequence[KnownModel]
) -> str:
    if incomplete:
        lacks = "; ".join(f"{e['name']} lacks {', '.join(e['missing'])}" for e in incomplete)
        return f"{folder} holds no whole model: {lacks}"
    looked_for = ", ".join(_telling_name(model) for model in catalogue)
    return (
        f"{folder} holds no known model; looked for {looked_for} in it and its sub folders "
        "(--name NAME takes a folder of .onnx files as a face pack)"
    )


def _telling_name(model: KnownModel) -> str:
    if model.is_pack:
        return f"{model.name}.zip"
    if model.marks:
        return next(file.path for file in model.files if file.path.endswith(_WEIGHTS))
    return Path(model.places[0]).name


def _files(folder: Path) -> list[Path]:
    """Regular files below `folder`, the shallow ones first; links to folders are not followed."""
    found: list[Path] = []
    for base, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - _HOUSEKEEPING)
        found += [path for name in names if (path := Path(base, name)).is_file()]
        if len(found) > MAX_FILES:
            raise ModelError(f"{folder} holds more than {MAX_FILES} files: give the models' own")
    return sorted(found, key=lambda path: (len(path.parts), path))


def _find_named(name: str, entry: KnownModel | None, folder: Path, files: list[Path]) -> _Found:
    found = _find(entry, files) if entry else None
    if found is None and (entry is None or entry.is_pack):
        found = _find_pack(check_name(name), entry, folder, files)
    if found is None:
        raise ModelError(f"{folder} holds no {name}; " + _looked_for(entry))
    return found


def _looked_for(entry: KnownModel | None) -> str:
    if entry is None or entry.is_pack:
        return "expected .onnx files (two at least: a detector and a recogniser) or one zip of them"
    paths = [file.path for file in entry.files] or [Path(entry.places[0]).name]
    return f"expected {', '.join(paths)}"


def _find(model: KnownModel, files: list[Path]) -> _Found | None:
    if model.is_pack:
        for path in files:
            if path.name == f"{model.name}.zip":
                piece = _Piece(source=path, path=path.name, sha256=model.files[0].sha256)
                return _Found(name=model.name, model=model, pieces=(piece,))
        folders = dict.fromkeys(f.parent for f in files if f.parent.name == model.name)
        pack = next((folder for folder in folders if is_face_pack(folder)), None)
        return _pack_of(model.name, model, pack) if pack else None
    if model.marks:
        return _find_folder(model, files)
    name = Path(model.places[0]).name
    path = next((path for path in files if path.name == name), None)
    if path is None:
        return None
    digest = model.files[0].sha256 if model.files else None
    piece = _Piece(source=path, path=name, sha256=digest)
    return _Found(name=model.name, model=model, pieces=(piece,))


def _find_pack(
    name: str, entry: KnownModel | None, folder: Path, files: list[Path]
) -> _Found | None:
    folders = [folder, *dict.fromkeys(file.parent for file in files)]
    pack = next((each for each in folders if is_face_pack(each)), None)
    if pack is not None:
        return _pack_of(name, entry, pack)
    zips = [path for path in files if path.suffix == ".zip"]
    if len(zips) != 1:
        return None
    digest = entry.files[0].sha256 if entry else None
    piece = _Piece(source=zips[0], path=zips[0].name, sha256=digest)
    return _Found(name=name, model=entry, pieces=(piece,))


def _pack_of(name: str, entry: KnownModel | None, folder: Path) -> _Found:
    digests = dict(entry.networks) if entry else {}
    paths = sorted(path for path in folder.glob("*.onnx") if path.is_file())
    pieces = tuple(_Piece(source=p, path=p.name, sha256=digests.get(p.name)) for p in paths)
    missing = tuple(sorted(set(digests) - {path.name for path in paths}))
    return _Found(name=name, model=entry, pieces=pieces, missing=missing)


def _find_folder(model: KnownModel, files: list[Path]) -> _Found | None:
    """The model's files below the folder that holds most of them."""
    there = set(files)
    # The last common folder of the files, such as `Animation`, may also be given under any name.
    cuts = (0, 1) if len({Path(file.path).parts[0] for file in model.files}) == 1 else (0,)
    roots = dict.fromkeys(root for file in files for root in (file.parent, *file.parents[1:2]))
    best: _Found | None = None
    for root, cut in ((root, cut) for root in roots for cut in cuts):
        pieces = tuple(
            _Piece(source=path, path=file.path, sha256=file.sha256)
            for file in model.files
            if (path := root.joinpath(*Path(file.path).parts[cut:])) in there
        )
        if not _tells(root, pieces):
            continue
        found = {piece.path for piece in pieces}
        missing = tuple(file.path for file in model.files if file.path not in found)
        if best is None or len(missing) < len(best.missing):
            best = _Found(name=model.name, model=model, pieces=pieces, missing=missing)
    return best


def _tells(root: Path, pieces: tuple[_Piece, ...]) -> bool:
    """Whether these files make the folder the model's: other pipelines have the same layout."""
    try:
        index = json.loads((root / "model_index.json").read_text(encoding="utf-8"))
        return bool(pieces) and index.get("_class_name") == _VIDEO_PIPELINE
    except (OSError, ValueError, AttributeError):
        return any(piece.path.endswith(_WEIGHTS) for piece in pieces)


def _stage(found: _Found, work: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Copy and verify a model's files; where the copy lies, and the record of its files."""
    records = [_copy(piece, work / "files" / piece.path, found) for piece in found.pieces]
    base = work / "files"
    if found.zipped:
        archive = base / found.pieces[0].path
        check_disk(unpacked_size(archive))
        names = unpack_networks(archive, work / "unpacked")
        if len(names) < 2:
            raise ModelError(f"{archive.name} holds one network: a face pack needs two at least")
        against = f"{archive.name}, {records[0]['verified_against']}"
        base = work / "unpacked"
        records = [_record(base / n, n, sha256(base / n), against) for n in names]
    single = found.model is not None and not found.model.is_pack and not found.model.marks
    return (base / found.pieces[0].path if single else base), records


def _copy(piece: _Piece, target: Path, found: _Found) -> dict[str, Any]:
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with piece.source.open("rb") as source, target.open("xb") as copy:
        while block := source.read(_CHUNK):
            digest.update(block)
            copy.write(block)
        copy.flush()
        os.fsync(copy.fileno())
    if piece.sha256 and digest.hexdigest() != piece.sha256:
        raise ModelError(
            f"{piece.source} is not the {piece.path} of {found.name}: it has SHA-256 "
            f"{digest.hexdigest()}, expected {piece.sha256}; nothing was imported "
            "(ANIMATOR_MODELS can name a folder of other files, which are taken unverified)"
        )
    against = "the catalogue's SHA-256" if piece.sha256 else "nothing: no digest is known"
    return _record(target, piece.path, digest.hexdigest(), against)


def _record(path: Path, name: str, digest: str, against: str) -> dict[str, Any]:
    size = path.stat().st_size
    return {"path": name, "size": size, "sha256": digest, "verified_against": against}


def _commit(
    found: _Found, staged: Path, records: list[dict[str, Any]], folder: Path
) -> dict[str, Any]:
    model = found.model
    place = cache_folder() / (model.places[0] if model else f"face/{found.name}")
    put(staged, place)
    licence = model.licence if model else UNKNOWN_LICENCE
    entry = {
        "source": f"imported from {folder.resolve()}",
        "files": records,
        "licence": licence,
        "non_commercial": model.non_commercial if model else None,
        "imported_at": now(),
    }
    record_model(found.name, entry)
    return {"name": found.name, "path": str(place), "licence": licence, "files": records}
