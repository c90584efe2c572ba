"""NumPy archives from outside: read whole, without pickles, within a limit."""

import zipfile
from pathlib import Path

import numpy as np

MAX_FILE_BYTES = 256 << 20  # unpacked; hours of one person


class NpzError(ValueError):
    """A file that is no archive of plain arrays, or one that is too large."""


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file.

    Raises:
        NpzError: for one that is damaged, holds objects, or unpacks to too much.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_FILE_BYTES:
            raise NpzError(
                f"{path}: unpacks to {size} bytes, expected at most {MAX_FILE_BYTES}: cut it."
            )
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except NpzError:
        raise
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise NpzError(f"{path}: cannot be read ({error}): write it with numpy.savez.") from None
