"""What img2dataset's downloader fetches through: urllib, held to the limits of this project.

Its downloader calls `urllib.request.urlopen`, which uses one opener for the whole process. `install` puts one there
that looks up what the thread fetches, and leaves every other thread as it was.
"""

import contextlib
import http.client
import io
import random
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from typing import Any

from yarl import URL

from pipelines.data.config import FetchConfig
from pipelines.data.fetch.addresses import AddressGuard
from pipelines.data.fetch.headers import retry_after_s
from pipelines.data.fetch.links import follow_link
from pipelines.data.img2dataset.messages import download_failure

_BACKOFF_S = 0.5
_READ_BYTES = 1 << 16
_threads = threading.local()


class LimitedFetch:
    """One link that is being fetched in this thread, while the `with` block lasts.

    Args:
        config: The limits.
        context: Of TLS.
    """

    def __init__(self, config: FetchConfig, context: ssl.SSLContext) -> None:
        self.config = config
        self.context = context
        self.guard = AddressGuard(config.allow_networks)
        self.deadline = time.monotonic() + config.deadline_s
        self.error: Exception | None = None
        self._num_tries = 0
        self._director = urllib.request.OpenerDirector()
        for handler in (_Http(), _Https(), _Redirects(), _Only200(), urllib.request.HTTPDefaultErrorHandler()):
            self._director.add_handler(handler)

    def __enter__(self) -> "LimitedFetch":
        _threads.fetch = self
        return self

    def __exit__(self, *_: object) -> None:
        _threads.fetch = None

    def remaining_s(self) -> float:
        """Returns the seconds left.

        Raises:
            TimeoutError: There are none.
        """
        remaining_s = self.deadline - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError("timed out")
        return remaining_s

    def open(self, request: urllib.request.Request) -> Any:
        """Returns the answer to a request, as `urlopen` does.

        img2dataset tries again at once, whatever went wrong: here a further try waits its time, and is none where it
        would not help.
        """
        if self._num_tries:
            self._wait()
        self._num_tries += 1
        self.error = None
        request.add_header("User-Agent", self.config.user_agent)
        try:
            return self._director.open(request, timeout=self.config.deadline_s)
        except Exception as error:
            if isinstance(error, urllib.error.HTTPError):
                # Nobody reads it, and as long as the error is kept so is its connection.
                error.close()
            self.error = error
            raise

    def _wait(self) -> None:
        error = self.error
        if error is None:
            # The answer came, and img2dataset did not want it.
            raise OSError("refused for its X-Robots-Tag")
        asked_s = 0.0
        if isinstance(error, urllib.error.HTTPError):
            asked_s = retry_after_s({"Retry-After": error.headers.get("Retry-After", "")})
        wait_s = asked_s + random.uniform(0.5, 1.5) * _BACKOFF_S * 2 ** (self._num_tries - 1)
        if not download_failure(str(error)).retryable or time.monotonic() + wait_s >= self.deadline:
            raise error
        time.sleep(wait_s)


def install() -> None:
    """Makes `urlopen` keep the limits of the `LimitedFetch` of its thread, where there is one."""
    urllib.request.install_opener(_ByThread())


class _ByThread(urllib.request.OpenerDirector):
    def __init__(self) -> None:
        super().__init__()
        self._others = urllib.request.build_opener()

    def open(self, fullurl: Any, data: Any = None, timeout: Any = socket._GLOBAL_DEFAULT_TIMEOUT) -> Any:  # type: ignore[attr-defined]
        fetch: LimitedFetch | None = getattr(_threads, "fetch", None)
        return self._others.open(fullurl, data, timeout) if fetch is None else fetch.open(fullurl)


def _connect(host: str, port: int) -> socket.socket:
    """Returns a connection to an address that was checked, and is the one that is connected to."""
    fetch: LimitedFetch = _threads.fetch
    found: list[Any] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    for info in found:
        fetch.guard.check(str(info[4][0]))
    error = OSError(f"{host} has no address")
    for info in found:
        connection = fetch.guard.open_socket(info)
        try:
            connection.settimeout(min(fetch.config.connect_timeout_s, fetch.remaining_s()))
            connection.connect(info[4])
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        except OSError as reason:
            connection.close()
            error = TimeoutError("connect timed out") if isinstance(reason, TimeoutError) else reason
            fetch.remaining_s()
    raise error


class _HttpConnection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = _connect(self.host, self.port)
        self.sock.settimeout(_threads.fetch.remaining_s())
        self.response_class = _Response


class _HttpsConnection(http.client.HTTPSConnection):
    def connect(self) -> None:
        fetch: LimitedFetch = _threads.fetch
        plain = _connect(self.host, self.port)
        with contextlib.ExitStack() as on_error:
            on_error.callback(plain.close)
            plain.settimeout(fetch.remaining_s())
            self.sock = fetch.context.wrap_socket(plain, server_hostname=self.host)
            on_error.pop_all()
        self.response_class = _Response


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HttpConnection, req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HttpsConnection, req)


class _Only200(urllib.request.HTTPErrorProcessor):
    handler_order = 1000

    def http_response(self, request: urllib.request.Request, response: http.client.HTTPResponse) -> Any:
        if response.status == 200:
            return response
        return self.parent.error("http", request, response, response.status, response.reason, response.headers)

    https_response = http_response


class _Redirects(urllib.request.BaseHandler):
    """Follows redirects as the native engine does: each leads to a link that is as untrusted as the first."""

    def http_error_302(
        self, req: Any, fp: Any, code: int, msg: str, headers: http.client.HTTPMessage
    ) -> http.client.HTTPResponse | None:
        location = headers.get("Location")
        if location is None:
            return None
        fp.close()
        fetch: LimitedFetch = _threads.fetch
        num_redirects = getattr(req, "num_redirects", 0) + 1
        if num_redirects > fetch.config.max_redirects:
            raise OSError("too many redirects")
        try:
            target = follow_link(URL(req.full_url, encoded=True), location)
        except ValueError:
            raise OSError("bad redirect") from None
        further: Any = urllib.request.Request(str(target), headers=dict(req.headers))
        further.num_redirects = num_redirects
        return self.parent.open(further, timeout=fetch.config.deadline_s)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


class _Response(http.client.HTTPResponse):
    """An answer whose every byte comes before the deadline, and that is not larger than allowed."""

    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(_InTime(sock), *args, **options)  # type: ignore[arg-type]

    def read(self, amt: int | None = None) -> bytes:
        """Returns the body, or so many bytes of it."""
        if amt is not None:
            return super().read(amt)
        fetch: LimitedFetch = _threads.fetch
        try:
            return self._read_all(fetch.config.max_bytes)
        except Exception as error:
            fetch.error = error
            raise

    def _read_all(self, max_bytes: int) -> bytes:
        body = bytearray()
        while True:
            if len(body) + (self.length or 0) > max_bytes:
                raise OSError("larger than max_bytes")
            block = super().read(_READ_BYTES)
            if not block:
                break
            body += block
        if self.length:
            raise http.client.IncompleteRead(bytes(body), self.length)
        return bytes(body)


class _InTime:
    """A socket as an answer reads it."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def makefile(self, _: str) -> io.BufferedReader:
        """Returns what is read from it."""
        return io.BufferedReader(_InTimeReader(self._socket))


class _InTimeReader(io.RawIOBase):
    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._file = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        # Before each read: a server that sends a byte now and then keeps within any time for one read.
        self._socket.settimeout(_threads.fetch.remaining_s())
        return self._file.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()
