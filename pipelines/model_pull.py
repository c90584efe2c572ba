"""Pulling known models into the cache: planned with what the sources say, fetched, verified.

A pull gathers its files in the cache's `.incoming/NAME` and moves the whole into place at the end,
so that a model is there whole or not at all; after a kill the same pull continues.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.model_archive import unpack_networks, unpacked_size
from pipelines.model_cache import (
    SourceError,
    cache_lock,
    check_disk,
    incoming,
    missing_licences,
    now,
    put,
    read_record,
    record_model,
    whole_in_cache,
)
from pipelines.model_catalogue import KnownModel, ModelError, RemoteFile, Terms, known
from pipelines.model_download import Downloader, discard, forget
from pipelines.model_source import UnreachableError, shown, source_of
from pipelines.model_verify import PlannedFile, check_file
from pipelines.models import cache_folder, find, sha256

Progress = Callable[[str, float, str], None]  # model, share 0..1, stage


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """A model of a plan: where it lies already, or the files to fetch."""

    model: KnownModel
    present: Path | None
    files: tuple[PlannedFile, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PullPlan:
    """What a pull would fetch."""

    models: tuple[PlannedModel, ...]

    @property
    def wanted(self) -> list[PlannedModel]:
        """The models that are not here yet."""
        return [planned for planned in self.models if planned.present is None]

    @property
    def size(self) -> int:
        """Bytes of all files to fetch."""
        return sum(file.size for planned in self.wanted for file in planned.files)

    @property
    def licences(self) -> list[Terms]:
        """Licences that must be accepted first."""
        return missing_licences(planned.model for planned in self.wanted)


def with_needs(names: Sequence[str]) -> list[KnownModel]:
    """The catalogue entries of these names and of what is pulled with them, each once."""
    found: dict[str, KnownModel] = {}
    for name in names:
        model = known(name)
        for each in (*(known(needed) for needed in model.needs), model):
            found.setdefault(each.name, each)
    return list(found.values())


def plan_pull(models: Iterable[KnownModel], downloader: Downloader) -> PullPlan:
    """Ask the sources of the models that are not here for sizes and digests; fetches nothing.

    Raises:
        ModelError: a model has no file that can be fetched.
        SourceError: a source cannot be reached, refuses, or publishes another file than the
            catalogue knows.
    """
    planned = []
    here = [(model, _present(model)) for model in models]
    for model, present in here:
        if present is not None:
            planned.append(PlannedModel(model=model, present=present))
            continue
        if not model.files:
            raise ModelError(
                f"{model.name} has no file that can be fetched ({model.purpose}): take it from "
                f"{model.source}, and give the folder of {model.places[1]} to "
                "`animator models import DIR`"
            )
        try:
            files = tuple(_plan_file(file, downloader) for file in model.files)
        except UnreachableError as error:
            absent = [model for model, present in here if present is None]
            raise UnreachableError(_elsewhere(str(error), absent)) from None
        planned.append(PlannedModel(model=model, present=None, files=files))
    return PullPlan(models=tuple(planned))


def pull(plan: PullPlan, downloader: Downloader, progress: Progress) -> list[dict[str, Any]]:
    """Fetch, verify and put into place what the plan wants; returns what lies where.

    Raises:
        ModelError: a licence was not accepted (see `model_cache.accept_licences`).
        SourceError: no room, no network, or something else than what was published came.
    """
    if unaccepted := plan.licences:
        names = " and ".join(f"{terms.name} ({terms.url})" for terms in unaccepted)
        raise ModelError(
            f"nothing is fetched before its licence is accepted: {names}; "
            "read it and repeat with --accept-licence"
        )
    with cache_lock():
        # A pack needs room for the zip and for what comes out of it.
        packs = sum(f.size for p in plan.wanted if p.model.is_pack for f in p.files)
        check_disk(sum(_left(p.model, f) for p in plan.wanted for f in p.files) + packs)
        results = []
        for planned in plan.models:
            if planned.present is None:
                try:
                    _pull_model(planned, downloader, progress)
                except UnreachableError as error:
                    raise UnreachableError(_elsewhere(str(error), [planned.model])) from None
            place = planned.present or cache_folder() / planned.model.places[0]
            results.append(_result(planned, place))
    return results


def _present(model: KnownModel) -> Path | None:
    if (place := whole_in_cache(model)) is not None:
        return place
    place = find(model.name)
    # One that a pull put there but did not record yet is pulled to its end.
    unfinished = (
        place is not None
        and place.is_relative_to(cache_folder())
        and (incoming(model.name).exists() or model.name in read_record()["models"])
    )
    return None if unfinished else place


def _plan_file(file: RemoteFile, downloader: Downloader) -> PlannedFile:
    source = source_of(file)
    published = downloader.probe(source)
    where = shown(source.url)
    size = file.size if file.size is not None else published.size
    if size is None:
        raise SourceError(f"{where} does not say how large it is: nothing is fetched without that")
    if published.size is not None and published.size != size:
        raise SourceError(
            f"{where} has {published.size} bytes, expected {size}: it is another file"
        )
    if published.sha256 and file.sha256 and published.sha256 != file.sha256:
        raise SourceError(
            f"{where} is published with SHA-256 {published.sha256}, expected {file.sha256}: "
            "it is another file"
        )
    return PlannedFile(file=file, source=source, published=published, size=size)


def _elsewhere(reason: str, models: Sequence[KnownModel]) -> str:
    files = [f"\n  {file.path}  {file.url}" for model in models for file in model.files]
    return (
        f"{reason}; files fetched elsewhere are taken with `animator models import DIR`, "
        f"where DIR holds them under these names:{''.join(files)}"
    )


def _pull_model(planned: PlannedModel, downloader: Downloader, progress: Progress) -> None:
    model, work = planned.model, incoming(planned.model.name)
    gathered = work / "files"
    total = sum(file.size for file in planned.files) or 1
    before, records = 0, []
    for file in planned.files:

        def on_bytes(count: int, before: int = before, path: str = file.file.path) -> None:
            progress(model.name, (before + count) / total, path)

        records.append(_fetch_file(file, gathered / file.file.path, downloader, on_bytes))
        before += file.size
    staged = gathered if model.marks else gathered / planned.files[0].file.path
    if model.is_pack:
        progress(model.name, 1.0, "unpacking")
        staged, records = _unpack(staged, work / "unpacked", records)
    put(staged, cache_folder() / model.places[0])
    record_model(
        model.name,
        {
            "source": model.source,
            "revision": next((f.published.revision for f in planned.files), None),
            "files": records,
            "licence": model.licence,
            "non_commercial": model.non_commercial,
            "licence_accepted_at": {
                terms.name: read_record()["licences"][terms.name]["accepted_at"]
                for terms in model.terms
            },
            "pulled_at": now(),
        },
    )
    shutil.rmtree(work)


def _fetch_file(
    planned: PlannedFile, target: Path, downloader: Downloader, on_bytes: Callable[[int], None]
) -> dict[str, Any]:
    """Fetch one file and verify it; only then does it get its name. Returns its record."""
    part = target.with_name(target.name + ".part")
    check = check_file(target, planned) if target.exists() else None  # of an earlier attempt
    if check is None or check.problem:
        published = planned.published
        hashed = bool(planned.file.sha256 or published.sha256 or published.git_id)
        downloader.fetch(planned.source, part, planned.size, hashed=hashed, on_bytes=on_bytes)
        check = check_file(part, planned)
        if check.problem:
            discard(part)
            raise SourceError(
                f"{shown(planned.source.url)} gave {check.problem}: what came was removed; "
                "pull again, or take the file from elsewhere"
            )
        os.replace(part, target)
        forget(part)
    on_bytes(planned.size)
    return {
        "path": planned.file.path,
        "url": planned.file.url,
        "fetched_from": shown(planned.source.url),
        "size": planned.size,
        "sha256": check.sha256,
        "verified_against": check.against,
    }


def _unpack(
    archive: Path, folder: Path, records: list[dict[str, Any]]
) -> tuple[Path, list[dict[str, Any]]]:
    shutil.rmtree(folder, ignore_errors=True)  # what a kill left
    try:
        check_disk(unpacked_size(archive))
        names = unpack_networks(archive, folder)
    except SourceError:
        raise
    except ModelError as error:
        raise SourceError(str(error)) from None
    against = f"{records[0]['path']}, SHA-256 {records[0]['sha256']}"
    networks = [
        {
            "path": name,
            "url": records[0]["url"],
            "fetched_from": records[0]["fetched_from"],
            "size": (folder / name).stat().st_size,
            "sha256": sha256(folder / name),
            "verified_against": f"{against} ({records[0]['verified_against']})",
        }
        for name in names
    ]
    return folder, networks


def _left(model: KnownModel, planned: PlannedFile) -> int:
    target = incoming(model.name) / "files" / planned.file.path
    part = target.with_name(target.name + ".part")
    have = next((p.stat().st_size for p in (target, part) if p.exists()), 0)
    return max(0, planned.size - have)


def _result(planned: PlannedModel, place: Path) -> dict[str, Any]:
    entry = read_record()["models"].get(planned.model.name) if planned.present is None else None
    return {
        "name": planned.model.name,
        "path": str(place),
        "pulled": planned.present is None,
        "licence": planned.model.licence,
        "files": entry["files"] if entry else [],
    }
