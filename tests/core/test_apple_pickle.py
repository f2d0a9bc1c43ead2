"""Reading a published checkpoint's pickle: damage is found, and nothing that a file asks for is ever run."""

import argparse
import builtins
import dataclasses
import enum
import os
import pickle
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mdm_core.apple_weights import load_apple_checkpoint
from mdm_core.errors import CheckpointError, ConfigError

STATE = {"w": torch.arange(4096.0).reshape(64, 64), "b": torch.ones(64)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A good file, to be spoilt."""
    path = tmp_path / "good.pth"
    torch.save({"state_dict": STATE, "batch_num": 7}, path)
    return path


@pytest.fixture
def published_modules() -> Iterator[types.ModuleType]:
    """Modules like the published ones, there while a file is pickled and gone when it is read."""

    class ScheduleType(enum.Enum):
        COSINE = 0
        DEEPFLOYD = 3

    @dataclasses.dataclass
    class SamplerConfig:
        num_diffusion_steps: int = 1000
        schedule_type: ScheduleType = ScheduleType.DEEPFLOYD
        rescale_signal: float | None = None

    package, module = types.ModuleType("ml_mdm"), types.ModuleType("ml_mdm.samplers")
    module.__dict__.update(ScheduleType=ScheduleType, SamplerConfig=SamplerConfig)
    for kind in (ScheduleType, SamplerConfig):
        kind.__module__, kind.__qualname__ = "ml_mdm.samplers", kind.__name__
    sys.modules |= {"ml_mdm": package, "ml_mdm.samplers": module}
    yield module
    sys.modules.pop("ml_mdm.samplers", None)
    sys.modules.pop("ml_mdm", None)


def test_configuration_of_classes_that_are_not_installed_is_plain_data(
    published_modules: types.ModuleType, tmp_path: Path
) -> None:
    args = argparse.Namespace(
        lr=5e-5,
        sampler_config=published_modules.SamplerConfig(),
        levels=[1, 2],
        config_path=Path("configs/a.yaml"),
    )
    numbers = {"batch_num": 7, "loss": 0.5, "exp_avg_loss": np.float64(0.1), "exp_avg_loss_var": np.float32(0.75)}
    path = tmp_path / "vis_model.pth"
    torch.save({"state_dict": STATE, **numbers, "args": args}, path)
    for name in ("ml_mdm.samplers", "ml_mdm"):
        del sys.modules[name]
    before = set(torch.serialization.get_safe_globals())
    checkpoint = load_apple_checkpoint(path)
    assert set(torch.serialization.get_safe_globals()) == before
    assert checkpoint.args == {
        "class": "argparse.Namespace",
        "lr": 5e-5,
        "sampler_config": {
            "class": "ml_mdm.samplers.SamplerConfig",
            "num_diffusion_steps": 1000,
            "schedule_type": {"class": "ml_mdm.samplers.ScheduleType", "arguments": [3]},
            "rescale_signal": None,
        },
        "levels": [1, 2],
        "config_path": {"class": "pathlib.PosixPath", "arguments": ["configs", "a.yaml"]},
    }
    assert (checkpoint.exp_avg_loss, checkpoint.exp_avg_loss_var, checkpoint.best_avg_loss) == (0.1, 0.75, None)
    assert "ml_mdm" not in sys.modules
    assert all(torch.equal(value, STATE[key]) for key, value in checkpoint.state_dict.items())


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("posix.system", lambda trap: Call(os.system, f"touch {trap}")),
        ("builtins.exec", lambda trap: Call(builtins.exec, f"open({str(trap)!r}, 'w')")),
        ("builtins.eval", lambda trap: Call(builtins.eval, f"open({str(trap)!r}, 'w')")),
        # Python 3 writes its older name into a pickle of this protocol.
        ("commands.Popen", lambda trap: Call(subprocess.Popen, ["touch", str(trap)])),
        ("builtins.getattr", lambda trap: Call(getattr, "text", "upper")),
    ],
)
@pytest.mark.parametrize("place", ["args", "loss", "state_dict"])
def test_file_that_asks_for_a_call_is_refused_and_nothing_runs(
    name: str, call: Any, place: str, tmp_path: Path
) -> None:
    trap, path = tmp_path / "sprung", tmp_path / "trap.pth"
    content: dict[str, Any] = {"state_dict": STATE, "args": None} | {place: call(trap)}
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=rf"trap\.pth asks for {name}, which has no place in a checkpoint"):
        load_apple_checkpoint(path)
    assert not trap.exists()


def test_module_that_a_file_names_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = tmp_path / "sprung"
    (tmp_path / "importable_trap.py").write_text(
        f"from pathlib import Path\nclass Trap: pass\nPath({str(trap)!r}).touch()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import importable_trap  # type: ignore[import-not-found]

    trap.unlink()
    torch.save({"state_dict": {}, "args": importable_trap.Trap()}, tmp_path / "trap.pth")
    monkeypatch.delitem(sys.modules, "importable_trap")
    with pytest.raises(CheckpointError, match=r"asks for importable_trap\.Trap"):
        load_apple_checkpoint(tmp_path / "trap.pth")
    assert not trap.exists()


def test_class_that_the_process_holds_safe_is_refused_all_the_same(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "args": Call(os.getpid)}, tmp_path / "trap.pth")
    torch.save({"state_dict": {}, "args": argparse.Namespace(lr=1)}, tmp_path / "namespace.pth")
    with torch.serialization.safe_globals([(os.getpid, "posix.getpid"), argparse.Namespace]):
        before = set(torch.serialization.get_safe_globals())
        with pytest.raises(CheckpointError, match=r"asks for posix\.getpid"):
            load_apple_checkpoint(tmp_path / "trap.pth")
        assert load_apple_checkpoint(tmp_path / "namespace.pth").args == {"class": "argparse.Namespace", "lr": 1}
        assert set(torch.serialization.get_safe_globals()) == before


def test_published_name_is_never_called_whatever_is_installed(
    published_modules: types.ModuleType, tmp_path: Path
) -> None:
    trap = tmp_path / "sprung"

    def spring(*arguments: object) -> None:
        trap.write_text(str(arguments))

    spring.__module__, spring.__qualname__ = "ml_mdm.samplers", "spring"
    published_modules.__dict__["spring"] = spring
    torch.save({"state_dict": {}, "args": Call(spring, "a", 1)}, tmp_path / "trap.pth")
    checkpoint = load_apple_checkpoint(tmp_path / "trap.pth")
    assert checkpoint.args == {"class": "ml_mdm.samplers.spring", "arguments": ["a", 1]}
    assert not trap.exists()


def with_pickle(source: Path, target: Path, data: bytes, *, drop_storage: int = 0) -> Path:
    """A copy of a file with another pickle in it, or with its first storage cut."""
    with zipfile.ZipFile(source) as good, zipfile.ZipFile(target, "w") as bad:
        for name in good.namelist():
            content = data if name.endswith("data.pkl") and data else good.read(name)
            bad.writestr(name, content[: len(content) - drop_storage] if name.endswith("data/0") else content)
    return target


GLOBAL_POSIX = b"cposix\nsystem\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        # A stand-in called, and its result called: only the names themselves can be.
        (b"\x80\x02cml_mdm.samplers\nx\n)R)R.", "can't be read: Trying to call reduce for unrecognized"),
        # The same through the state of a stand-in, whose attribute must not become a way to call.
        (b"\x80\x02cml_mdm.samplers\nx\n)R}X\x08\x00\x00\x00__call__" + GLOBAL_POSIX + b"sb.", r"asks for posix\.sys"),
        (b"\x80\x02" + GLOBAL_POSIX + b"(X\x04\x00\x00\x00truetR.", r"asks for posix\.system"),
        # Python 2's names for the same things are translated before they are compared.
        (b"\x80\x02c__builtin__\neval\n(X\x01\x00\x00\x001tR.", r"asks for builtins\.eval"),
        # INST, OBJ, EXT and STACK_GLOBAL are other ways to name or call something.
        (b"\x80\x02(S'true'\niposix\nsystem\n.", "a pickle instruction that torch.save does not"),
        (b"\x80\x02(" + GLOBAL_POSIX + b"X\x04\x00\x00\x00trueo.", "a pickle instruction that torch.save does not"),
        (b"\x80\x02\x82\x01.", "a pickle instruction that torch.save does not"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "a pickle instruction that torch.save does not"),
        (b"\x80\x02", "can't be read: EOFError"),
        (b"\x80\x02].", 'has no "state_dict" with weights: it is no dict'),
        (b"\x80\x02}X\x01\x00\x00\x00aK\x01s.", r'has no "state_dict" with weights: it has \[\'a\'\]'),
    ],
)
def test_crafted_pickle_is_refused(data: bytes, message: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_apple_checkpoint(with_pickle(saved, tmp_path / "crafted.pth", data))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>404</html>", "it is a web page, so the download failed"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "it is a pointer of Git LFS"),
        (pickle.dumps({"state_dict": {}}, 2), r"torch older than 1\.6.*convert it with torch\.save"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{}", "it looks like a safetensors file"),
        (b"GIF89a", "it is not what torch.save writes"),
        (b"PK\x03\x04" + bytes(100), "cut short or damaged"),
    ],
)
def test_what_is_no_checkpoint_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_apple_checkpoint(path)


def test_legacy_file_of_torch_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"convert it with torch\.save\(torch\.load"):
        load_apple_checkpoint(tmp_path / "old.pth")


def test_missing_file_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*none\.pth"):
        load_apple_checkpoint(tmp_path / "none.pth")


def test_zip_of_something_else_is_no_checkpoint(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"not one that torch\.save wrote"):
        load_apple_checkpoint(tmp_path / "a.zip")


def test_compressed_parts_are_refused(saved: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(saved) as good, zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in good.namelist():
            bomb.writestr(name, bytes(10_000_000) if name.endswith("data/0") else good.read(name))
    assert (tmp_path / "bomb.pth").stat().st_size < 50_000
    with pytest.raises(CheckpointError, match=r"compressed parts, which torch\.save never writes"):
        load_apple_checkpoint(tmp_path / "bomb.pth")


def test_damage_anywhere_in_the_file_is_found(saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    for position in range(200, len(whole), len(whole) // 20):
        (tmp_path / "cut.pth").write_bytes(whole[:position])
        with pytest.raises(CheckpointError, match="cut short or damaged"):
            load_apple_checkpoint(tmp_path / "cut.pth")
    with zipfile.ZipFile(saved) as archive:
        weight = max(archive.infolist(), key=lambda entry: entry.file_size)
    flipped = bytearray(whole)
    flipped[weight.header_offset + weight.file_size // 2] ^= 1
    (tmp_path / "flipped.pth").write_bytes(flipped)
    torch.load(tmp_path / "flipped.pth", weights_only=True)  # torch does not notice.
    with pytest.raises(CheckpointError, match="damaged"):
        load_apple_checkpoint(tmp_path / "flipped.pth")


def test_tensor_larger_than_what_the_file_holds_for_it_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="can't be read"):
        load_apple_checkpoint(with_pickle(saved, tmp_path / "short.pth", b"", drop_storage=4))
    # Here the storage is whole, and the tensor on it claims 1,000 elements of its 8.
    torch.save({"state_dict": {"w": torch.zeros(8)}}, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as archive:
        data = archive.read("w/data.pkl")
    assert data.count(b"K\x00K\x08\x85") == 1
    larger = data.replace(b"K\x00K\x08\x85", b"K\x00M\xe8\x03\x85")
    crafted = with_pickle(tmp_path / "w.pth", tmp_path / "crafted.pth", larger)
    with pytest.raises(CheckpointError, match="can't be read"):
        load_apple_checkpoint(crafted)


def test_configuration_that_repeats_itself_stays_small_and_a_cycle_is_refused(tmp_path: Path) -> None:
    bomb: list[Any] = ["x"]
    for _ in range(60):
        bomb = [bomb, bomb]
    torch.save({"state_dict": {}, "args": bomb}, tmp_path / "bomb.pth")
    loaded = load_apple_checkpoint(tmp_path / "bomb.pth").args
    assert loaded[0] is loaded[1]
    cycle: list[Any] = []
    cycle.append(cycle)
    torch.save({"state_dict": {}, "args": cycle}, tmp_path / "cycle.pth")
    with pytest.raises(CheckpointError, match="contains itself"):
        load_apple_checkpoint(tmp_path / "cycle.pth")
