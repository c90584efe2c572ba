"""The host's memory where tensors of some megabytes come and go by the thousand."""

import ctypes
from functools import cache
from typing import Any

from torch import Tensor

_EVERY_BYTES = 16 * 2**20


@cache
def _c_library() -> Any:
    try:
        library = ctypes.CDLL("libc.so.6")
        return library if hasattr(library, "malloc_trim") else None
    except OSError:  # neither glibc nor Linux
        return None


def give_back() -> None:
    """Return to the system what was freed; nothing happens without glibc.

    glibc hardly uses again what torch allocates by (`posix_memalign`) and frees, in sizes of up to
    32 MB: the heap of a pass over many frames grows to twice what is alive, and keeps it.
    """
    library = _c_library()
    if library is not None:
        library.malloc_trim(0)


class Sweeper:
    """Gives back what was freed, each time that enough was kept on the host meanwhile.

    A heap whose kept pieces lie between freed ones grows by both, and by how much is luck.
    """

    def __init__(self) -> None:
        self._kept = 0

    def kept(self, tensor: Tensor) -> None:
        """Note a tensor that stays for a while."""
        if tensor.device.type != "cpu":
            return
        self._kept += tensor.numel() * tensor.element_size()
        if self._kept > _EVERY_BYTES:
            give_back()
            self._kept = 0
