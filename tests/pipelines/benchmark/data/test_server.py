"""The server, asked by Python's own HTTP client and by bare sockets."""

import http.client
import socket
import time
import urllib.request
from urllib.parse import urlsplit

import pytest

from pipelines.benchmark.data.photos import tiny
from pipelines.benchmark.data.server import PhotoServer


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as response:
        body: bytes = response.read()
    return body


def test_each_request_counts_once_and_gives_its_picture(photo_server, photos):
    before_s = time.time()
    for number in (0, 5, 5):
        assert get(photo_server.url("photo", number)) == (photos / f"0-{number:06d}.jpg").read_bytes()
    assert get(photo_server.url("tiny", 7)) == tiny(7)
    seen = photo_server.seen()
    assert (seen["requests"], seen["links"], seen["kinds"]) == (4, 3, {"photo": 3, "tiny": 1})
    assert before_s <= seen["first_s"] <= seen["last_s"] <= time.time()
    photo_server.forget()
    empty = {"requests": 0, "links": 0, "kinds": {}, "first_s": None, "last_s": None}
    assert photo_server.seen() == empty


def test_a_connection_is_used_again(photo_server):
    address = urlsplit(photo_server.url("tiny", 0))
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=10)
    ports = set()
    for number in range(3):
        connection.request("GET", f"/tiny/{number}")
        assert connection.getresponse().read() == tiny(number)
        ports.add(connection.sock.getsockname()[1])
    connection.close()
    assert len(ports) == 1
    assert photo_server.seen()["requests"] == 3


def test_links_are_spread_over_hosts(photo_server):
    hosts = {urlsplit(photo_server.url("photo", number)).hostname for number in range(200)}
    assert len(hosts) == 64
    assert all(str(host).startswith("127.0.1.") for host in hosts)


def ask(url: str) -> socket.socket:
    address = urlsplit(url)
    connection = socket.create_connection((address.hostname, address.port), timeout=5)
    connection.sendall(f"GET {address.path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return connection


def read_on(connection: socket.socket) -> None:
    while connection.recv(100):
        pass


def test_trouble_is_what_it_says(photo_server):
    with ask(photo_server.url("reset", 0)) as reset, pytest.raises(ConnectionResetError):
        read_on(reset)
    with ask(photo_server.url("stall", 1)) as stall:
        stall.settimeout(0.3)
        with pytest.raises(TimeoutError):
            stall.recv(1)
    with ask(photo_server.url("drip", 2)) as drip:
        head = b""
        while not head.endswith(b"\xff"):
            head += drip.recv(1)
        assert b"Content-Length: 1000000\r\n\r\n\xff" in head
        drip.settimeout(0.3)
        # The next byte takes a second.
        with pytest.raises(TimeoutError):
            drip.recv(1)
    assert photo_server.seen()["kinds"] == {"reset": 1, "stall": 1, "drip": 1}


def wait_for(server: PhotoServer, field: str) -> float:
    """The field's value, once there is one."""
    for _ in range(1000):
        if (value := server.seen()[field]) is not None:
            return float(value)
        time.sleep(0.01)
    raise AssertionError(f"the server has no {field} after ten seconds")


def test_an_unanswered_request_ends_when_its_client_leaves(photo_server):
    stall = ask(photo_server.url("stall", 1))
    wait_for(photo_server, "first_s")
    assert photo_server.seen()["last_s"] is None
    left_s = time.time()
    stall.close()
    assert wait_for(photo_server, "last_s") >= left_s
