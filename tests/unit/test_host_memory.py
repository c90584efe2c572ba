"""Memory that was freed goes back to the system."""

import ctypes
from collections.abc import Iterator

import pytest
import torch

from animator.host_memory import Sweeper, give_back
from inference.peak_memory import host_now


@pytest.fixture
def end_of_heap() -> Iterator[torch.Tensor]:
    """The last of 500 tensors of a heap that were freed, below which 200 MB stay with the process.

    They are small enough that the allocator does not map them one by one.
    """
    try:
        ctypes.CDLL("libc.so.6").malloc_trim  # noqa: B018
    except (OSError, AttributeError):
        pytest.skip("the C library is not glibc")
    pieces = [torch.ones(100_000) for _ in range(500)]
    last = pieces.pop()
    del pieces
    yield last
    assert last.sum() == 100_000


def test_what_the_heap_holds_of_freed_tensors_is_given_back(end_of_heap: torch.Tensor) -> None:
    before = host_now()
    give_back()
    assert before - host_now() > 100e6


def test_a_sweeper_gives_back_once_enough_is_kept(end_of_heap: torch.Tensor) -> None:
    before, sweeper = host_now(), Sweeper()
    sweeper.kept(torch.ones(2**20))  # 4 MB
    assert before - host_now() < 50e6
    for _ in range(4):
        sweeper.kept(torch.ones(2**20))
    assert before - host_now() > 100e6
