"""What lies in a bucket (`s3://`, `gs://`), listed through fsspec.

Endpoints and credentials are the machine's own, as fsspec and the clouds' clients read them from
the environment: `AWS_PROFILE`, `GOOGLE_APPLICATION_CREDENTIALS`; `FSSPEC_S3_ANON=true` or
`FSSPEC_GS_TOKEN=anon` for public buckets.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.curation.plan import PlanError

SCHEMES = ("s3", "gs")
_CHUNK = 8 << 20
_HIDDEN = re.compile(r"(?:^|/)\.")
_PUBLIC = {"s3": "FSSPEC_S3_ANON=true", "gs": "FSSPEC_GS_TOKEN=anon"}


def is_glob(address: str) -> bool:
    """Whether the address stands for several objects by `*`, `?` or `[…]`."""
    return any(sign in address for sign in "*?[")


def find(address: str, suffixes: tuple[str, ...]) -> list[str]:
    """The addresses of the objects that a folder, a glob or an object stands for.

    In a folder, objects whose lower-cased name ends with one of `suffixes` count, and hidden ones
    (`.name`) do not. The address of one such object is taken as it is, without a request.

    Raises:
        PlanError: the bucket cannot be listed.
    """
    if not is_glob(address) and address.lower().endswith(suffixes):
        return [address]
    with _explained(address) as (files, path):
        names = _find(files, path, suffixes)
    scheme = address.partition("://")[0].lower()
    return [f"{scheme}://{name}" for name in names]


@contextmanager
def fetched(address: str, max_bytes: int) -> Iterator[Path]:
    """A copy of a small object, such as a manifest, gone afterwards.

    Raises:
        PlanError: it cannot be read, or has more than `max_bytes` bytes.
    """
    with tempfile.NamedTemporaryFile(suffix=Path(address).suffix) as copy:
        with _explained(address) as (files, path), files.open(path, "rb") as stream:
            num_bytes = 0
            while chunk := stream.read(_CHUNK):
                num_bytes += len(chunk)
                if num_bytes > max_bytes:
                    raise PlanError(f"{address} has over {max_bytes} bytes: divide it.")
                copy.write(chunk)
        copy.flush()
        yield Path(copy.name)


def _find(files: Any, path: str, suffixes: tuple[str, ...]) -> list[str]:
    if not is_glob(path) or files.exists(path):
        return _under(files, path, suffixes)
    names = []
    for name, info in files.glob(path, detail=True).items():
        is_folder = info["type"] == "directory"
        names += _under(files, name, suffixes) if is_folder else [name]
    return names


def _under(files: Any, folder: str, suffixes: tuple[str, ...]) -> list[str]:
    names = files.find(folder)
    if names == [folder]:
        return names
    start = len(folder.rstrip("/")) + 1
    return [
        name
        for name in names
        if name.lower().endswith(suffixes) and not _HIDDEN.search(name[start:])
    ]


@contextmanager
def _explained(address: str) -> Iterator[tuple[Any, str]]:
    """The file system of an address and its path there; its errors as ours."""
    import fsspec

    scheme = address.partition("://")[0].lower()
    # Not through fsspec's own reading of addresses, in which `::` leads to other file systems.
    if "::" in address:
        raise PlanError(f"got {address!r}, expected no '::' in the address of a bucket.")
    try:
        files = fsspec.filesystem(scheme, use_listings_cache=False)
        yield files, files._strip_protocol(address)
    except (PlanError, MemoryError):
        raise
    except ImportError as error:
        raise PlanError(f"{address} needs a package that is not installed: {error}") from None
    # Each cloud has exceptions of its own, derived from nothing in common.
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise PlanError(
            f"{address} cannot be listed: {type(error).__name__}: {text}. Check the name and the "
            f"machine's credentials; for a public bucket set {_PUBLIC[scheme]}."
        ) from None
