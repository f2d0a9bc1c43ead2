"""What the tests of the data side share."""

from collections.abc import Iterator

import pytest

from tests.pipelines.data.picture_server import PictureServer


@pytest.fixture(scope="session")
def running_server() -> Iterator[PictureServer]:
    """One server for all tests."""
    with PictureServer() as server:
        yield server


@pytest.fixture
def server(running_server: PictureServer) -> PictureServer:
    """The server, with nothing on it and nothing asked of it yet."""
    running_server.files.clear()
    running_server.forget()
    return running_server
