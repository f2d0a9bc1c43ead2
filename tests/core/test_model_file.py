"""The model file: what comes back is what went in, and every way to spoil it is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from mdm_core.config import MatryoshkaConfig, UNetConfig
from mdm_core.errors import CheckpointError, ConfigError
from mdm_core.model_file import load_model, read_header, save_model
from mdm_core.nested_unet import build_network
from mdm_core.noise_schedule import NoiseSchedule
from mdm_core.unet import UNet

CONFIG = MatryoshkaConfig(
    (
        UNetConfig(
            resolution=8,
            channels=(8, 16),
            num_resnets=(1, 1),
            num_attention_layers=(0, 0),
            time_dim=32,
            micro_conditions=(("scale", 8.0),),
            mid_blocks=False,
            num_heads=4,
            num_groups=8,
        ),
        UNetConfig(
            resolution=4,
            channels=(8,),
            num_resnets=(1,),
            num_attention_layers=(1,),
            time_dim=32,
            text_dim=6,
            num_heads=4,
            num_groups=8,
        ),
    )
)
SCHEDULE = NoiseSchedule(num_timesteps=50, shift_power=2.0)


def network(seed: int = 0) -> UNet:
    built = build_network(CONFIG).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return built


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "models" / "model.safetensors"
    save_model(path, network(), schedule=SCHEDULE, prediction_type="eps", metadata={"images": 12, "encoder": "minilm"})
    return path


def rewritten(path: Path, *, metadata: dict[str, str] | None = None, **tensors: torch.Tensor | None) -> Path:
    """The file with other metadata, and with tensors replaced (None: left out)."""
    with safe_open(path, "pt") as file:
        old = dict(file.metadata())
    state = {**safetensors.torch.load_file(path), **tensors}
    target = path.with_name("rewritten.safetensors")
    kept = {key: value for key, value in state.items() if value is not None}
    safetensors.torch.save_file(kept, target, old | metadata if metadata is not None else old)
    return target


def test_model_comes_back_as_it_was(saved: Path) -> None:
    model = load_model(saved)
    assert (model.config, model.schedule, model.metadata) == (CONFIG, SCHEDULE, {"images": 12, "encoder": "minilm"})
    assert model.prediction_type == "eps"
    assert not model.network.training
    before = network().state_dict()
    assert list(model.network.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.network.state_dict().items())
    x_t = [torch.randn(2, 3, side, side) for side in (8, 4)]
    rest = (torch.tensor([3, 40]), torch.randn(2, 5, 6))
    with torch.no_grad():
        for ours, theirs in zip(model.network.eval()(x_t, *rest), network()(x_t, *rest), strict=True):
            assert torch.equal(ours, theirs)
    header = read_header(saved)
    assert (header.config, header.schedule, header.metadata) == (model.config, model.schedule, model.metadata)


def test_loaded_network_trains_and_leaves_the_file_alone(saved: Path) -> None:
    before = saved.read_bytes()
    loaded = load_model(saved).network
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    loaded([torch.randn(1, 3, side, side) for side in (8, 4)], torch.tensor([3]))[0].sum().backward()
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1)
    assert saved.read_bytes() == before


def test_loaded_network_outlives_a_file_that_is_replaced(saved: Path) -> None:
    loaded = load_model(saved).network
    save_model(saved, network(seed=1), schedule=SCHEDULE, prediction_type="eps")
    assert torch.equal(loaded.conv_in.weight, network(seed=0).conv_in.weight)
    assert torch.equal(load_model(saved).network.conv_in.weight, network(seed=1).conv_in.weight)
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_precision_is_the_file_s_or_the_one_asked_for(dtype: torch.dtype, saved: Path) -> None:
    assert {value.dtype for value in load_model(saved, dtype=dtype).network.state_dict().values()} == {dtype}
    save_model(saved, network().to(dtype), schedule=SCHEDULE, prediction_type="eps")
    assert {value.dtype for value in load_model(saved).network.state_dict().values()} == {dtype}
    widened = load_model(saved, dtype=torch.float32).network.state_dict()
    assert torch.equal(widened["conv_in.weight"], network().conv_in.weight.to(dtype).float())


def test_channels_last_networks_are_saved_in_the_usual_order(saved: Path) -> None:
    save_model(saved, network().to(memory_format=torch.channels_last), schedule=SCHEDULE, prediction_type="eps")
    assert torch.equal(load_model(saved).network.conv_in.weight, network().conv_in.weight)


def test_file_can_be_read_by_whom_the_umask_lets(saved: Path) -> None:
    (saved.parent / "other").touch()
    assert saved.stat().st_mode == (saved.parent / "other").stat().st_mode


def test_any_reader_of_safetensors_reads_it(saved: Path) -> None:
    assert safetensors.torch.load_file(saved).keys() == network().state_dict().keys()
    with safe_open(saved, "pt") as file:
        values = json.loads(file.metadata()["mdm_model"])
    assert MatryoshkaConfig.from_dict(values["config"]) == CONFIG


def test_the_same_model_is_the_same_bytes(saved: Path) -> None:
    metadata = load_model(saved).metadata
    before = saved.read_bytes()
    for order in (sorted, reversed) * 4:
        again = dict(order(metadata.items()))
        save_model(saved, network(), schedule=SCHEDULE, prediction_type="eps", metadata=again)
        assert saved.read_bytes() == before


def test_a_file_of_the_first_layout_is_read(saved: Path) -> None:
    wanted = read_header(saved)
    with safe_open(saved, "pt") as file:
        values = json.loads(file.metadata()["mdm_model"])
    assert values.pop("format") == 2
    first = rewritten(saved, metadata={"mdm_format": "1", "mdm_model": json.dumps(values)})
    assert read_header(first) == wanted
    assert torch.equal(load_model(first).network.conv_in.weight, network().conv_in.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_out.bias": None}, r"don't fit the 8 px network: 1 missing: norm_out\.bias$"),
        ({"odd": torch.zeros(1)}, "1 left over: odd$"),
        ({"conv_out.bias": torch.zeros(4)}, r"1 of another shape: conv_out\.bias is \(4,\), wanted \(3,\)$"),
        ({"metadata": {"mdm_model": '{"format": 3}'}}, "has format version 3, and this code reads up to 2; update it"),
        ({"metadata": {"mdm_model": "{"}}, "the configuration in .* can't be used"),
        ({"metadata": {"mdm_model": '{"prediction_type": "v"}'}}, r"can't be used: KeyError\('config'\)"),
        ({"metadata": {"mdm_model": '{"config": {"networks": []}}'}}, r"can't be used: KeyError\('prediction_type'\)"),
        ({"metadata": {"mdm_model": '{"prediction_type": "noise"}'}}, "prediction_type='noise' is unknown"),
        ({"metadata": {"mdm_model": '{"format": "2"}'}}, "can't be used: .*format='2' is no version"),
        ({"metadata": {"mdm_model": '{"format": 1.5}'}}, "can't be used: .*format=1.5 is no version"),
        ({"metadata": {"mdm_model": '{"format": Infinity}'}}, "can't be used: .*format=inf is no version"),
        ({"metadata": {"mdm_model": '{"format": 0}'}}, "can't be used: .*format=0 is no version"),
        ({"metadata": {"mdm_model": "[2]"}}, "can't be used: .*wanted a JSON object, got list"),
        (
            {"metadata": {"mdm_model": '{"prediction_type": "v", "config": {"networks": [{"side": 8}]}}'}},
            "can't be used.* unknown field",
        ),
        (
            {"metadata": {"mdm_model": '{"prediction_type": "v", "config": {"networks": []}}'}},
            "can't be used: ConfigError",
        ),
    ],
)
def test_file_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str, saved: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(rewritten(saved, **changes))


def test_weights_without_configuration_are_not_a_model(tmp_path: Path) -> None:
    safetensors.torch.save_file(network().state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="holds tensors, but no configuration: it was not written by save_model"):
        load_model(tmp_path / "weights.safetensors")


def test_damaged_files_are_named(saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    for end in (0, 4, 100, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors is damaged, or no safetensors file"):
            load_model(tmp_path / "cut.safetensors")
    torch.save({"state_dict": {}}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"written by torch\.save; .* read by mdm_core\.apple_weights"):
        load_model(tmp_path / "a.pth")
    with pytest.raises(ConfigError, match="there is no file"):
        load_model(tmp_path / "none.safetensors")


def test_what_is_not_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for values in ({"path": Path("a")}, {"loss": float("nan")}):
        with pytest.raises(ConfigError, match="metadata must be JSON"):
            save_model(tmp_path / "a.safetensors", network(), schedule=SCHEDULE, prediction_type="eps", metadata=values)
    wrapped = torch.nn.Sequential(network())
    with pytest.raises(ConfigError, match="a Sequential is no network of ours; give the network inside the wrapper"):
        save_model(tmp_path / "a.safetensors", wrapped, schedule=SCHEDULE, prediction_type="eps")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
