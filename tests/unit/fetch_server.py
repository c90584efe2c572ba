"""A web server that behaves as told, path by path, for tests of fetching; and a bucket on it."""

import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """How one request is answered; `cut` breaks off after so many bytes."""

    content: bytes = b""
    type: str = "video/mp4"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    says_length: bool = True
    cut: int | None = None
    drip: float = 0.0  # seconds between pieces
    piece: int = 1 << 16


class WebServer:
    """Answers each path with the next of its answers, the last one for ever; knows what it did."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        self.answers: dict[str, list[Answer]] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer._handle(self)

            def do_HEAD(self) -> None:
                outer._handle(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer((address, 0), Handler)
        self._server.daemon_threads = True
        self.host = f"{address}:{self._server.server_port}"
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://{self.host}{path}"

    def serve(self, path: str, *answers: Answer) -> str:
        """Answer `path` so from now on; its address."""
        self.answers[path] = list(answers)
        return self.url(path)

    def paths(self, method: str = "GET") -> list[str]:
        return [path for asked, path, _ in self.requests if asked == method]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        with self._lock:
            headers = {name.lower(): value for name, value in handler.headers.items()}
            self.requests.append((handler.command, handler.path, headers))
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            answer = self.choose(handler.command, handler.path)
        try:
            with suppress(OSError):
                self._send(handler, answer, headers.get("range"))
        finally:
            with self._lock:
                self._at_once -= 1

    def choose(self, method: str, path: str) -> Answer:
        waiting = self.answers.get(path)
        if not waiting:
            return Answer(status=404)
        return waiting.pop(0) if len(waiting) > 1 else waiting[0]

    def _send(self, handler: BaseHTTPRequestHandler, answer: Answer, span: str | None) -> None:
        content, status = answer.content, answer.status
        if span and status == 200:
            first, _, last = span.removeprefix("bytes=").partition("-")
            end = int(last) + 1 if last else len(content)
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {first}-{end - 1}/{len(content)}")
            content = content[int(first) : end]
        else:
            handler.send_response(status)
        handler.send_header("Content-Type", answer.type)
        if answer.says_length:
            handler.send_header("Content-Length", str(len(content)))
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command == "HEAD":
            return
        content = content[: answer.cut]
        for start in range(0, len(content), answer.piece):
            handler.wfile.write(content[start : start + answer.piece])
            handler.wfile.flush()
            time.sleep(answer.drip)


_ERROR = '<?xml version="1.0"?><Error><Code>{}</Code><Message>no</Message></Error>'
_LISTING = b'<?xml version="1.0"?><ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>'


class Bucket(WebServer):
    """As much of S3 as reading takes: objects under `/BUCKET/KEY`, errors in XML."""

    def put(self, path: str, *answers: Answer) -> None:
        for answer in answers:
            answer.headers.setdefault("ETag", f'"{len(answer.content)}"')
            answer.headers.setdefault("Last-Modified", "Wed, 01 Jan 2025 00:00:00 GMT")
        self.answers[path] = list(answers)

    def choose(self, method: str, path: str) -> Answer:
        if "list-type=2" in path:
            return Answer(_LISTING, type="application/xml")
        path = path.partition("?")[0]
        if path not in self.answers:
            return self.refusal(404, "NoSuchKey")
        if method == "HEAD":
            return self.answers[path][0]
        return super().choose(method, path)

    def refusal(self, status: int, code: str) -> Answer:
        return Answer(_ERROR.format(code).encode(), type="application/xml", status=status)
