"""What the process with the models and the process that decodes say to each other.

Messages are JSON objects behind their length, on a socket. Nothing is unpickled: a decoder that a
hostile video has taken over can say what it likes, but not run anything here. Frames do not
travel: both have the file they lie in (`pipelines.curation.frames.FrameSpool`).

What this does not cover: the process with the models decodes each kept clip, which the decoder has
encoded, to annotate the very frames that are stored. A decoder that a video has taken over could
write another file there, and attack the H.264 decoder of the process with the models; it would have
to find a second fault, in the demuxer of mp4 or the decoder of H.264. The same process reads the
keypoint files beside videos, with NumPy and without unpickling.
"""

import json
import socket
import struct
import time
from typing import Any

MAX_MESSAGE_BYTES = 64 << 20
_LENGTH = struct.Struct("<Q")
_CHUNK = 1 << 20


class WireError(ValueError):
    """The other side said what cannot be understood."""


class Link:
    """One end of the socket."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._received = bytearray()

    def send(self, kind: str, data: Any, seconds: float | None = None) -> None:
        """Send a message.

        Raises:
            OSError: nobody listens any more, or not within `seconds` (TimeoutError).
        """
        body = json.dumps([kind, data], separators=(",", ":"), allow_nan=False).encode()
        self._socket.settimeout(seconds)
        self._socket.sendall(_LENGTH.pack(len(body)) + body)

    def receive(self, seconds: float | None = None) -> tuple[str, Any] | None:
        """The next message; None where none is complete after `seconds`.

        Raises:
            EOFError: the other side is gone.
            WireError: it is no message.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while (body := self._complete()) is None:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            if left == 0.0 and seconds:
                return None
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(_CHUNK)
            except (TimeoutError, BlockingIOError):
                return None
            except ConnectionError:
                data = b""
            if not data:
                raise EOFError
            self._received += data
        return _parsed(body)

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _complete(self) -> bytes | None:
        if len(self._received) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._received)
        if length > MAX_MESSAGE_BYTES:
            raise WireError(f"a message of {length} bytes")
        end = _LENGTH.size + length
        if len(self._received) < end:
            return None
        body = bytes(self._received[_LENGTH.size : end])
        del self._received[:end]
        return body


def _parsed(body: bytes) -> tuple[str, Any]:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WireError(f"a message that is not JSON ({error})") from None
    if not (isinstance(message, list) and len(message) == 2 and isinstance(message[0], str)):
        raise WireError("a message without a kind")
    return message[0], message[1]
