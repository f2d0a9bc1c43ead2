"""Published checkpoints: they load, they round-trip, and nothing that a file asks for is ever run."""

import argparse
import builtins
import dataclasses
import enum
import json
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
from safetensors.torch import load_file

from mdm_core.apple_config import config_from_apple
from mdm_core.apple_weights import load_apple_checkpoint, load_apple_weights, save_apple_checkpoint
from mdm_core.config import MatryoshkaConfig, UNetConfig
from mdm_core.errors import CheckpointError, ConfigError
from mdm_core.nested_unet import NestedUNet, build_network
from mdm_core.progressive import grow
from mdm_core.unet import UNet

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference"
CASES = ["a_unet", "b_nested", "c_nested2"]
LAYOUT = ["state_dict", "batch_num", "loss", "best_avg_loss", "exp_avg_loss", "exp_avg_loss_var", "args"]
needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="the reference numbers (../shared/reference) are absent"
)

SMALL: dict[str, Any] = {
    "resolution_channels": [32, 32],
    "num_resnets_per_resolution": [1, 1],
    "num_attention_layers": [0, 1],
    "attention_levels": [1],
    "temporal_dim": 32,
}


def small_network(**changed: Any) -> UNet:
    return build_network(config_from_apple(SMALL | changed, text_dim=8, resolution=8))


def nested_network() -> UNet:
    return small_network(attention_levels=[], inner_config=SMALL)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A good file, to be spoilt."""
    path = tmp_path / "good.pth"
    save_apple_checkpoint(small_network(), path, batch_num=7)
    return path


def reference_network(name: str) -> tuple[UNet, dict[str, torch.Tensor], list[str]]:
    case = json.loads((REFERENCE / "index_forward.json").read_text())["cases"][name]
    data = load_file(REFERENCE / case["file"])
    config = config_from_apple(
        case["unet_config"], text_dim=case["conditioning_feature_dim_passed"], resolution=data["in.x0"].shape[-1]
    )
    return build_network(config).eval(), data, list(case["state_shapes"])


@needs_reference
@pytest.mark.parametrize("name", CASES)
def test_published_checkpoint_loads_computes_the_same_and_saves_back(name: str, tmp_path: Path) -> None:
    network, data, keys = reference_network(name)
    source = REFERENCE / f"{name}_vis_model_000007.pth"
    checkpoint = load_apple_checkpoint(source)
    assert list(checkpoint.state_dict) == keys
    assert (checkpoint.batch_num, checkpoint.loss, checkpoint.best_avg_loss) == (7, 0.5, 0.6)
    assert (checkpoint.exp_avg_loss, checkpoint.exp_avg_loss_var, checkpoint.args) == (0.6, 0.36, None)
    assert load_apple_weights(network, source) == ()
    x_t = [data[f"in.x{level}"] for level in range(len(network.resolutions))]
    with torch.no_grad():
        outputs = network(x_t, data["in.times"], data["in.cond"], data["in.mask"])
    for level, output in enumerate(outputs):
        torch.testing.assert_close(output, data[f"out.default.y{level}"], atol=2e-5, rtol=0)

    args = {"lr": 5e-5, "unet_config": {"resolution_channels": [32, 32]}, "names": ("a", None, True)}
    save_apple_checkpoint(network, tmp_path / "back.pth", batch_num=8, exp_avg_loss=0.25, args=args)
    original = torch.load(source, weights_only=True)["state_dict"]
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(back) == LAYOUT
    assert list(back["state_dict"]) == list(original)
    assert all(torch.equal(value, original[key]) for key, value in back["state_dict"].items())
    assert (back["batch_num"], back["best_avg_loss"], back["args"]) == (8, 0.25, args)


@needs_reference
def test_published_checkpoint_grows_a_larger_network() -> None:
    large, data, _ = reference_network("c_nested2")
    assert isinstance(large, NestedUNet)
    growth = grow(large, load_apple_checkpoint(REFERENCE / "a_unet_vis_model_000007.pth").weights)
    assert len(growth.inherited) == 173
    assert len(growth.fresh) == 353 - 173
    with torch.no_grad():
        outputs = large(
            [data[f"in.x{level}"] for level in range(3)], data["in.times"], data["in.cond"], data["in.mask"]
        )
    small, _, _ = reference_network("a_unet")
    load_apple_weights(small, REFERENCE / "a_unet_vis_model_000007.pth")
    with torch.no_grad():
        (alone,) = small([data["in.x2"]], data["in.times"], data["in.cond"], data["in.mask"])
    assert torch.equal(outputs[-1], alone)


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
    torch.save({"state_dict": small_network().state_dict(), **numbers, "args": args}, path)
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
    load_apple_weights(small_network(), checkpoint)


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
    content: dict[str, Any] = {"state_dict": small_network().state_dict(), "args": None} | {place: call(trap)}
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


@pytest.mark.parametrize("value", [1.5, [torch.zeros(1)], torch.zeros(2).to_sparse(), torch.zeros(2, device="meta")])
def test_state_dict_holds_plain_tensors_only(value: Any, tmp_path: Path) -> None:
    torch.save({"state_dict": {"conv_in.weight": value}}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"'conv_in\.weight' in its state_dict is a .*, wanted a plain tensor"):
        load_apple_checkpoint(tmp_path / "odd.pth")


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    source, target = small_network().to(dtype), small_network()
    save_apple_checkpoint(source, tmp_path / "half.pth", batch_num=1)
    load_apple_weights(target, tmp_path / "half.pth")
    for key, value in target.state_dict().items():
        assert value.dtype is torch.float32
        assert torch.equal(value, source.state_dict()[key].float())


def test_mismatch_names_a_few_and_loads_nothing(tmp_path: Path) -> None:
    state = {key: value + 1 for key, value in small_network().state_dict().items()}
    del state["conv_in.weight"]
    state["conv_out.bias"] = torch.zeros(4)
    state["conv_out.weight"] = torch.zeros(3, 32, 3, 3, dtype=torch.int64)
    state |= {f"odd.{index}": torch.zeros(1) for index in range(5)}
    torch.save({"state_dict": state}, tmp_path / "odd.pth")
    network = small_network()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(
        CheckpointError,
        match=r"the weights in .*odd\.pth don't fit the 8 px network: 1 missing: conv_in\.weight; "
        r"5 left over: odd\.0, odd\.1, odd\.2, …; 2 of another shape: conv_out\.bias is \(4,\), wanted \(3,\), "
        r"conv_out\.weight is int64, wanted float32$",
    ):
        load_apple_weights(network, tmp_path / "odd.pth")
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_weights_of_the_inner_network_alone_name_grow(tmp_path: Path) -> None:
    save_apple_checkpoint(small_network(), tmp_path / "inner.pth", batch_num=1)
    with pytest.raises(CheckpointError, match=r"those of the 4 px network inside it alone: .*progressive\.grow"):
        load_apple_weights(nested_network(), tmp_path / "inner.pth")
    save_apple_checkpoint(nested_network(), tmp_path / "whole.pth", batch_num=1)
    with pytest.raises(CheckpointError, match="those of a network with 1 more shell around it"):
        load_apple_weights(small_network(), tmp_path / "whole.pth")


def test_layers_that_the_published_code_builds_and_never_runs_are_left_out(tmp_path: Path) -> None:
    network = nested_network()
    unused = {"interp_layer1.weight": torch.ones(2), "mid_blocks.0.resnets.0.conv1.bias": torch.ones(2)}
    unused |= {"cond_emb.weight": torch.ones(2)}
    torch.save({"state_dict": {**network.state_dict(), **unused}}, tmp_path / "published.pth")
    assert load_apple_weights(nested_network(), tmp_path / "published.pth") == tuple(unused)
    # In the innermost network the same names are layers that run, and must fit.
    extra = {**network.state_dict(), "inner_unet.interp_layer1.weight": torch.ones(2)}
    torch.save({"state_dict": extra}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"1 left over: inner_unet\.interp_layer1\.weight"):
        load_apple_weights(nested_network(), tmp_path / "odd.pth")


def test_failed_write_leaves_the_file_that_was_there(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def write_half(content: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(OSError, match="disk full"):
        save_apple_checkpoint(small_network(), saved, batch_num=9)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_only_plain_arguments_are_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"args\['place'\]\[1\] is a PosixPath; only dicts"):
        save_apple_checkpoint(small_network(), tmp_path / "a.pth", batch_num=1, args={"place": ["a", Path("b")]})
    assert not (tmp_path / "a.pth").exists()


def test_views_are_written_alone(tmp_path: Path) -> None:
    network = build_network(
        MatryoshkaConfig(
            (UNetConfig(resolution=4, channels=(32,), num_resnets=(1,), num_attention_layers=(0,), time_dim=32),)
        )
    ).to(memory_format=torch.channels_last)
    whole = torch.zeros(1_000_000)
    assert network.conv_out.bias is not None
    network.conv_out.bias.data = whole[:3]
    save_apple_checkpoint(network, tmp_path / "a.pth", batch_num=1)
    loaded = torch.load(tmp_path / "a.pth", weights_only=True)["state_dict"]
    assert (tmp_path / "a.pth").stat().st_size < 1_000_000
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in loaded.items())
