"""What the tests of the data benchmark share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.benchmark.data.photos import write_photos
from pipelines.benchmark.data.server import PhotoServer

NUM_PHOTOS = 12


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few photos."""
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, NUM_PHOTOS)
    return folder


@pytest.fixture(scope="session")
def running_server(photos: Path) -> Iterator[PhotoServer]:
    """One server for all tests."""
    with PhotoServer(photos, count=NUM_PHOTOS, cores=[0]) as server:
        yield server


@pytest.fixture
def photo_server(running_server: PhotoServer) -> PhotoServer:
    """The server, with nothing asked of it yet."""
    running_server.forget()
    return running_server
