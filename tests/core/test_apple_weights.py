"""Published checkpoints: they load, compute the same, round-trip, and what does not fit is named."""

import json
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize("value", [1.5, [torch.zeros(1)], torch.zeros(2).to_sparse(), torch.zeros(2, device="meta")])
def test_state_dict_holds_plain_tensors_only(value: Any, tmp_path: Path) -> None:
    torch.save({"state_dict": {"conv_in.weight": value}}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"'conv_in\.weight' in its state_dict is a .*, wanted a plain tensor"):
        load_apple_checkpoint(tmp_path / "odd.pth")


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
