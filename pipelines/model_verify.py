"""What a file is held against before it is taken: the catalogue's digest, or its source's own."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pipelines.model_catalogue import RemoteFile
from pipelines.model_download import Published
from pipelines.model_source import Source
from pipelines.models import sha256


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """One file to fetch, its size and what its source publishes of it."""

    file: RemoteFile
    source: Source
    published: Published
    size: int


@dataclass(frozen=True, kw_only=True)
class Check:
    """A fetched file's digest, what it was held against, and what is wrong with it."""

    sha256: str
    against: str
    problem: str | None


def check_file(path: Path, planned: PlannedFile) -> Check:
    """Hold a fetched file against the catalogue's digest, or else the one its source publishes."""
    size, digest = path.stat().st_size, sha256(path)
    host, published = planned.source.host, planned.published
    found, kind = digest, "SHA-256"
    if planned.file.sha256:
        expected, against = planned.file.sha256, "the catalogue's SHA-256"
    elif published.sha256:
        expected, against = published.sha256, f"the SHA-256 published by {host}"
    elif published.git_id:
        found, kind = git_id(path), "git id"
        expected, against = published.git_id, f"the git id published by {host}"
    else:
        expected, against = digest, "its size alone: no digest is published"
    problem = None
    if size != planned.size:
        problem = f"{size} bytes, expected {planned.size}"
    elif found != expected:
        problem = f"{kind} {found}, expected {expected} ({against})"
    return Check(sha256=digest, against=against, problem=problem)


def git_id(path: Path) -> str:
    """The id git gives the file's content (SHA-1)."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
