"""Whose trouble an error is: the machine's, which stops the run, or the source's, which is noted.

A full disk fails every source there is: they must not be written off for it. A source that cannot
be read fails alone: the run must not stop for it, now and at every start.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

# Whatever was being done.
MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE}
# Where one of the run's own files was being worked on.
OWN_FILE_ERRORS = MACHINE_ERRORS | {errno.EIO}
# Of a file of someone else's that may be read another time.
PASSING_ERRORS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN}


class OwnFileError(OSError):
    """One of the run's own files could not be written."""


@contextmanager
def own_files() -> Iterator[None]:
    """What goes wrong in the body is of the run's own files, also where a library says it.

    Raises:
        OwnFileError: with the number of the system's error.
    """
    try:
        yield
    except Exception as error:
        found = _of_system(error)
        if found is None or found.errno not in OWN_FILE_ERRORS:
            raise
        raise OwnFileError(found.errno, found.strerror) from None


def is_of_machine(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, must stop the run."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in OWN_FILE_ERRORS:
            return True
        error = error.__cause__
    return False


def _of_system(error: BaseException | None) -> OSError | None:
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        error = error.__cause__
    return None
