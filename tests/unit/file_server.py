"""A real HTTP server for tests of downloads: ranges, broken transfers, refusals, redirects."""

import hashlib
import ssl
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Served:
    """How one path is answered."""

    content: bytes = b""
    said_sha256: str | None = None  # the hub's header, where it differs from the content's
    etag: str | None = None
    status: int = 200
    redirect: str | None = None
    cut: list[int] = field(default_factory=list)  # bytes after which a transfer breaks off, once
    pause: float = 0.0  # seconds between blocks of 64 kB
    chunked: bool = False  # no Content-Length on GET
    said_size: int | None = None  # what HEAD says


class FileServer:
    """Serves `files` by path on a local port, and remembers every request."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.files: dict[str, Served] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                outer._answer(self, body=False)

            def do_GET(self) -> None:
                outer._answer(self, body=True)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        scheme, host = "http", "127.0.0.1"
        if context is not None:
            scheme, host = "https", "localhost"
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"{scheme}://{host}:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def gets(self) -> list[tuple[str, dict[str, str]]]:
        """Path and headers of every GET."""
        return [(path, headers) for method, path, headers in self.requests if method == "GET"]

    def _answer(self, handler: BaseHTTPRequestHandler, *, body: bool) -> None:
        headers = {name.lower(): value for name, value in handler.headers.items()}
        self.requests.append((handler.command, handler.path, headers))
        served = self.files.get(handler.path)
        if served is None or served.status >= 400:
            handler.send_response(404 if served is None else served.status)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        if served.redirect:
            handler.send_response(302)
            handler.send_header("Location", served.redirect)
            if served.content:  # as the hub describes what lies behind
                self._describe(handler, served)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        self._send(handler, served, headers, body=body)

    def _describe(self, handler: BaseHTTPRequestHandler, served: Served) -> None:
        digest = served.said_sha256 or hashlib.sha256(served.content).hexdigest()
        handler.send_header("X-Linked-Etag", f'"{digest}"')
        handler.send_header("X-Linked-Size", str(len(served.content)))
        handler.send_header("X-Repo-Commit", "0123456789abcdef")

    def _send(
        self,
        handler: BaseHTTPRequestHandler,
        served: Served,
        headers: dict[str, str],
        *,
        body: bool,
    ) -> None:
        start = 0
        fresh = headers.get("if-range") in (None, served.etag)
        if headers.get("range") and fresh:
            start = int(headers["range"].removeprefix("bytes=").removesuffix("-"))
        content = served.content[start:]
        handler.send_response(206 if start else 200)
        if start:
            whole = len(served.content)
            handler.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
        if served.etag:
            handler.send_header("ETag", served.etag)
        if served.said_sha256:
            self._describe(handler, served)
        if served.chunked and body:
            handler.send_header("Connection", "close")
            handler.close_connection = True
        else:
            length = len(content) if body or served.said_size is None else served.said_size
            handler.send_header("Content-Length", str(length))
        handler.end_headers()
        if not body:
            return
        if served.cut:
            content, handler.close_connection = content[: served.cut.pop(0)], True
        try:
            for offset in range(0, len(content), 1 << 16):
                handler.wfile.write(content[offset : offset + (1 << 16)])
                time.sleep(served.pause)
        except OSError:
            handler.close_connection = True
