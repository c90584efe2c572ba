"""Trying again what may pass: with growing pauses, so many times, up to a moment."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from pipelines.curation.config import DownloadConfig
from pipelines.curation.fetch_errors import FetchError

T = TypeVar("T")


class Attempts:
    """What is left of one download's tries and time; shared by all its steps.

    deadline: of `time.monotonic()`, the earlier of the caller's and the settings' own.
    """

    def __init__(self, config: DownloadConfig, deadline: float | None = None) -> None:
        self.left = config.retries
        self.deadline = time.monotonic() + config.timeout_seconds
        self._pause = config.backoff_seconds
        self._latest = deadline
        self._limit()

    def run(self, step: Callable[[], T]) -> T:
        """The step's result; FetchError once it is permanent, or tries or time are used up."""
        pause = self._pause
        while True:
            try:
                return step()
            except FetchError as error:
                # A little apart, so that workers do not come back all at once.
                wait = max(pause * random.uniform(0.75, 1.25), error.retry_after or 0.0)
                late = time.monotonic() + wait >= self.deadline
                if error.kind != "transient" or self.left <= 0 or late:
                    raise
            self.left -= 1
            pause *= 2
            time.sleep(wait)

    def pardon(self, seconds: float) -> None:
        """Time that was spent in a queue is not the download's."""
        self.deadline += seconds
        self._limit()

    def _limit(self) -> None:
        if self._latest is not None:
            self.deadline = min(self.deadline, self._latest)


def too_slow() -> FetchError:
    """The time for a download is used up."""
    return FetchError(
        "took longer than it may: try again later, or raise download.timeout_seconds", "transient"
    )
