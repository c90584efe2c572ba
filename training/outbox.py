"""A queue to a receiver that may be slow, away for hours, or back with everything to catch up."""

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Generic, TypeVar

Item = TypeVar("Item")
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0  # seconds between attempts while nobody answers


def warn(text: str) -> None:
    """Say it where nobody passed on a better place."""
    warnings.warn(text, RuntimeWarning, stacklevel=3)


class Outbox(Generic[Item]):
    """Items on their way out, sent in order by a thread of their own; never raises, never blocks.

    While the receiver is away the items wait, and one sentence says that it went; when it is back
    another one does. Where more wait than there is room for, every second of them is dropped: what
    remains still spans the whole time.

    Args:
        to: the receiver's name, for the sentences.
        send: hands over a list of items. What raised is sent again, so it must bear repetition.
        room: most items that wait.
        together: most items of one call.
        refused: whether an error says that the receiver is there and will never take these items;
            each is then tried by itself, and dropped where that fails too.
        say: takes a sentence for the user.
    """

    def __init__(
        self,
        to: str,
        send: Callable[[list[Item]], None],
        *,
        room: int = 10_000,
        together: int = 50,
        refused: Callable[[Exception], bool] = lambda error: False,
        say: Callable[[str], None] = warn,
    ) -> None:
        self._to, self._send, self._refused, self._say = to, send, refused, say
        self._room, self._together = room, together
        self._waiting: deque[Item] = deque()
        self._sending: list[Item] = []
        self._dropped = 0
        self._away_since: float | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"to {to}", daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        """Queue an item; after `close` it is ignored."""
        with self._changed:
            if self._closing:
                return
            if len(self._waiting) >= self._room:
                before = len(self._waiting)
                self._waiting = deque(islice(self._waiting, 0, None, 2))
                self._dropped += before - len(self._waiting)
            self._waiting.append(item)
            self._changed.notify()

    def __len__(self) -> int:
        """Items that are not delivered yet."""
        return len(self._waiting) + len(self._sending)

    def close(self, patience: float = 20.0) -> int:
        """Give what waits `patience` seconds to get out; how many items did not."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(patience)
        if left := len(self):
            self._tell(f"{left} entries did not reach {self._to}; they are in the run's folder.")
        return left

    def _run(self) -> None:
        while self._take():
            self._deliver()

    def _take(self) -> bool:
        """Move the next items from waiting to sending; False at the end."""
        with self._changed:
            while not self._waiting and not self._closing:
                self._changed.wait()
            for _ in range(min(self._together, len(self._waiting))):
                self._sending.append(self._waiting.popleft())
            return bool(self._sending)

    def _deliver(self) -> None:
        pause = _FIRST_PAUSE
        while self._sending:
            try:
                self._send(self._sending)
            except Exception as error:
                if self._refused(error):
                    self._deliver_singly()
                    return
                self._note_away(error)
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, timeout=pause)
                if self._closing:  # the condition no longer pauses
                    time.sleep(_FIRST_PAUSE)
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                self._sending.clear()
                self._note_back()

    def _deliver_singly(self) -> None:
        """Find out which items the receiver will not have; the others get through."""
        for item in self._sending:
            try:
                self._send([item])
            except Exception as error:
                if not self._dropped:
                    self._tell(f"{self._to} refuses an entry ({_reason(error)}); it is dropped.")
                self._dropped += 1
        self._sending.clear()

    def _note_away(self, error: Exception) -> None:
        if self._away_since is None:
            self._away_since = time.monotonic()
            self._tell(
                f"{self._to} does not answer ({_reason(error)}); training goes on, its numbers "
                "wait here and are in metrics.jsonl."
            )

    def _note_back(self) -> None:
        if self._away_since is None:
            return
        seconds = time.monotonic() - self._away_since
        self._away_since = None
        lost = f"{self._dropped} of the entries are lost" if self._dropped else "nothing is lost"
        self._tell(f"{self._to} answers again after {seconds:.0f} s; {lost}.")

    def _tell(self, text: str) -> None:
        try:
            self._say(text)
        except Exception:
            pass  # a warning that is an error here must not end the thread


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
