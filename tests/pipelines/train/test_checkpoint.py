"""Checkpoints written beside the training: whole or absent, old ones gone only then, killed writers harmless."""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mdm_core.errors import CheckpointError, WorkError
from mdm_core.model_file import read_header
from pipelines import storage
from pipelines.large_files import sha256
from pipelines.train.checkpoint import latest_checkpoint, list_checkpoints, open_checkpoint
from pipelines.train.checkpoint_writer import CheckpointWriter, save_checkpoint
from tests.pipelines.s3_server import S3Server

from .small_state import manifest, state

SAVE_FILE = "pipelines.train.tensor_files.save_file"


def seen(run: str) -> list[int]:
    return [int(uri[-12:]) for uri in list_checkpoints(run)]


def value(run: str, name: str = "weights") -> float:
    newest = latest_checkpoint(run)
    assert newest is not None
    (number,) = newest.tensors(name)["w"].unique().tolist()
    return float(number)


def no_space(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class SlowDisk:
    """Holds each file back until it is let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked, self.let_through = threading.Semaphore(0), threading.Semaphore(0)

        def held_back(*arguments: Any) -> None:
            self.asked.release()
            self.let_through.acquire()
            save_file(*arguments)

        monkeypatch.setattr(SAVE_FILE, held_back)

    def let(self, count: int) -> None:
        for _ in range(count):
            self.let_through.release()


def test_what_is_saved_is_what_the_tensors_were_at_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, run, tensors = SlowDisk(monkeypatch), str(tmp_path / "run"), state(1.0)
    told = manifest(16)
    with CheckpointWriter(run, keep=2) as writer:
        writer.save(told, tensors)
        disk.asked.acquire()
        # The training goes on while nothing is written yet.
        for part in tensors.values():
            part["w"].add_(1)
        told.metrics["seconds"] = 2.0
        assert latest_checkpoint(run) is None
        disk.let(3)
        writer.wait()
        newest = open_checkpoint(run)
        assert [newest.tensors(name)["w"].tolist() for name in ("weights", "ema", "optimizer")] == [[1.0, 1.0]] * 3
        assert newest.manifest.metrics == {"seconds": 1.0}
    header = read_header(Path(newest.uri) / "ema.safetensors")
    assert header.config.resolutions == (8,)
    assert header.metadata["images_seen"] == 16


def test_a_second_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, run = SlowDisk(monkeypatch), str(tmp_path / "run")
    with CheckpointWriter(run, keep=2) as writer:
        writer.save(manifest(16), state(1.0))
        assert writer.blocked_s < 0.15
        second = threading.Thread(target=writer.save, args=(manifest(32), state(2.0)))
        second.start()
        time.sleep(0.2)
        assert second.is_alive()
        disk.let(3)
        second.join()
        assert seen(run) == [16]
        disk.let(3)
    assert writer.blocked_s >= 0.15
    assert seen(run) == [16, 32]


def test_old_checkpoints_go_once_the_new_one_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, deleted = str(tmp_path / "run"), []
    delete = storage.delete

    def watched(uri: str) -> None:
        if storage.exists(uri) and "images-" in uri:
            deleted.append((int(uri.partition("images-")[2][:12]), seen(run)))
        delete(uri)

    monkeypatch.setattr(storage, "delete", watched)
    with CheckpointWriter(run, keep=2) as writer:
        for images in (16, 32, 48, 64):
            writer.save(manifest(images), state(images))
    assert seen(run) == [48, 64]
    # At its first deletion, the manifest's, each had two newer ones beside it.
    assert deleted[::2] == [(16, [16, 32, 48]), (32, [32, 48, 64])]


def test_a_failing_upload_is_told_and_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = str(tmp_path / "run")
    message = r"disk is full: could not write 1,096 bytes to .*images-000000000032/weights\.safetensors"
    save_checkpoint(run, manifest(16), state(1.0))
    writer = CheckpointWriter(run, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        writer.save(manifest(32), state(2.0))
        with pytest.raises(WorkError, match=message):
            writer.wait()
    # Nothing is written after a failure, which every call tells again.
    for call in (lambda: writer.save(manifest(48), state(3.0)), writer.wait, lambda: writer.__exit__(None, None, None)):
        with pytest.raises(WorkError, match=message):
            call()
    assert seen(run) == [16]
    assert value(run) == 1.0
    assert not list(tmp_path.rglob("*.partial"))


def test_what_the_system_refuses_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(WorkError, match=r"could not write 40,000 bytes to .*weights.*: .*File too large"):
            save_checkpoint(str(tmp_path), manifest(16), state(1.0, size=10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def full(*arguments: Any) -> None:
        # As safetensors 0.8 says it.
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(SAVE_FILE, full)
    with pytest.raises(WorkError, match="the disk is full: could not write 8 bytes"):
        save_checkpoint(str(tmp_path), manifest(16), state(1.0))
    assert storage.list_files(str(tmp_path)) == []


def test_damaged_ones_are_passed_over_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = str(tmp_path / "run")
    for images in (16, 32, 48):
        save_checkpoint(run, manifest(images), state(images))
    folder = tmp_path / "run" / "stage-0"
    damaged = folder / "images-000000000048" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    newest = latest_checkpoint(run)
    assert newest is not None
    assert newest.manifest.images_seen == 32
    assert newest.passed_over == (f"{damaged} is damaged: its checksum is not the manifest's",)
    assert f"{damaged} is damaged" in caplog.text
    # What is not used is not read.
    assert [latest_checkpoint(run, used=used).manifest.images_seen for used in ([], ["ema"])] == [48, 48]  # type: ignore[union-attr]
    (folder / "images-000000000032" / "ema.safetensors").unlink()
    assert value(run) == 16.0
    (folder / "images-000000000016" / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints"):
        latest_checkpoint(run)


def test_a_file_is_read_once_and_outlives_its_deletion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, reads = str(tmp_path / "run"), []
    save_checkpoint(run, manifest(16), state(3.0, size=100_000))

    def watched(path: Path) -> str:
        reads.append(path.name)
        return sha256(path)

    monkeypatch.setattr("pipelines.train.tensor_files.sha256", watched)
    newest = latest_checkpoint(run)
    assert newest is not None
    tensors = newest.tensors("optimizer")
    assert sorted(reads) == ["ema.safetensors", "optimizer.safetensors", "weights.safetensors"]
    tensors["w"][0] = 5.0
    storage.delete(run)
    assert tensors["w"].double().sum().item() == 3.0 * 99_999 + 5.0
    # A second caller has tensors of its own.
    save_checkpoint(run, manifest(16), state(3.0, size=100_000))
    assert newest.tensors("optimizer")["w"][0] == 3.0


KILLED = """
import sys, time
from pipelines.train import tensor_files
from pipelines.train.checkpoint_writer import CheckpointWriter
from tests.pipelines.train.small_state import manifest, state
run, die_at = sys.argv[1], int(sys.argv[2])
written = 0
save_file = tensor_files.save_file
def slow(tensors, path, header):
    global written
    save_file(tensors, path, header)
    written += 1
    if written == 3 + die_at:
        print("now", flush=True)
        time.sleep(60)
tensor_files.save_file = slow
with CheckpointWriter(run, keep=1) as writer:
    writer.save(manifest(16), state(1.0))
    writer.save(manifest(32), state(2.0))
"""


@pytest.mark.parametrize("die_at", [1, 3])
def test_a_writer_killed_in_mid_upload_leaves_the_checkpoint_before(tmp_path: Path, die_at: int) -> None:
    run = str(tmp_path / "run")
    with subprocess.Popen([sys.executable, "-c", KILLED, run, str(die_at)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"now\n"
        os.kill(process.pid, signal.SIGKILL)
    half = tmp_path / "run" / "stage-0" / "images-000000000032"
    assert len(list(half.iterdir())) == die_at
    assert value(run) == 1.0
    with CheckpointWriter(run, keep=1) as writer:
        assert not list(tmp_path.rglob("*.partial"))
        writer.save(manifest(48), state(3.0))
    assert {file.rpartition("/")[0][-12:] for file in storage.list_files(run)} == {"000000000048"}
    assert value(run) == 3.0


def test_checkpoints_on_object_storage(bucket: str, s3_server: S3Server, tmp_path: Path) -> None:
    run = storage.join(bucket, "run")
    # Left by a killed writer: an upload in parts.
    other = s3_server.filesystem()
    place = {"Bucket": bucket.removeprefix("s3://"), "Key": "run/stage-0/images-000000000016/ema.safetensors"}
    begun = other.call_s3("create_multipart_upload", **place)
    other.call_s3("upload_part", **place, PartNumber=1, UploadId=begun["UploadId"], Body=b"x")
    # Large enough to be uploaded in parts.
    large = {"w": torch.arange(26_300_000, dtype=torch.float32)}
    with CheckpointWriter(run, keep=1) as writer:
        assert "Uploads" not in other.call_s3("list_multipart_uploads", Bucket=place["Bucket"])
        writer.save(manifest(16), state(1.0))
        writer.save(manifest(32), state(2.0) | {"weights": large})
    assert seen(run) == [32]
    assert len(other.find(f"{bucket}/run")) == 4
    newest = open_checkpoint(run)
    assert newest.tensors("ema")["w"].tolist() == [2.0, 2.0]
    assert torch.equal(newest.tensors("weights")["w"], large["w"])
    averages = f"{newest.uri}/ema.safetensors"
    other.pipe_file(averages, other.cat_file(averages)[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match=rf"{averages} is damaged"):
        open_checkpoint(newest.uri).tensors("ema")
    other.rm_file(averages)
    with pytest.raises(CheckpointError, match=r"has lost its ema\.safetensors"):
        open_checkpoint(newest.uri).tensors("ema")


def test_what_was_verified_is_not_read_again_until_it_is_let_go(tmp_path: Path) -> None:
    run = str(tmp_path)
    save_checkpoint(run, manifest(8), state(3.0))
    kept = latest_checkpoint(run)
    assert kept is not None
    for name in ("ema", "optimizer"):
        (Path(kept.uri) / f"{name}.safetensors").unlink()
    assert kept.tensors("ema")["w"].unique().tolist() == [3.0]
    kept.release()
    with pytest.raises(CheckpointError, match=r"has lost its optimizer\.safetensors"):
        kept.tensors("optimizer")
