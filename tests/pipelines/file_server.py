"""A web server on loopback that serves files, whole or in ranges, and cuts some short."""

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self


class FileServer:
    """Serves `files` by path; those of `cut_short` end in the middle, and `/forbidden…` is."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.cut_short: set[str] = set()
        self.asked: list[str] = []
        files = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                files.answer(self, sends_body=False)

            def do_GET(self) -> None:
                files.answer(self, sends_body=True)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def url(self, path: str) -> str:
        """Returns the link to a path."""
        return f"http://127.0.0.1:{self._server.server_port}{path}"

    def answer(self, request: BaseHTTPRequestHandler, *, sends_body: bool) -> None:
        """Serves one request."""
        self.asked.append(f"{request.command} {request.path}")
        path = request.path.partition("?")[0]
        body = self.files.get(path)
        if body is None or path.startswith("/forbidden"):
            request.send_response(404 if body is None else 403)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if found := re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", "")):
            start, stop = int(found[1]), min(int(found[2]) + 1, len(body))
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(body)}")
            body = body[start:stop]
        else:
            request.send_response(200)
        request.send_header("Content-Length", str(len(body)))
        if path in self.etags:
            request.send_header("ETag", self.etags[path])
        request.end_headers()
        if sends_body:
            request.wfile.write(body[: len(body) // 2] if path in self.cut_short else body)
        if path in self.cut_short:
            request.close_connection = True
