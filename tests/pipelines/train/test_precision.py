"""A run in bfloat16, and a compiled one, against the run in float32 that PyTorch takes as it comes."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.data.table.sample_table import SampleTable
from pipelines.train.checkpoint import open_checkpoint
from pipelines.train.config import TrainConfig
from pipelines.train.place import Place
from pipelines.train.stage import RunContext
from pipelines.train.worker import train_stages

from .conftest import run_config
from .listener import KilledError, Listener

_LEARNING_RATE = 1e-3


def train(config: TrainConfig, table: SampleTable, *, die_after: int | None = None) -> dict[tuple[int, int], float]:
    """The losses by stage and images of what is left; dies on the event after `die_after` of them."""
    listener = Listener(die_after)
    train_stages(RunContext(config, table.version, "run"), place=Place(), hooks=listener)
    return {(event["stage"], event["images"]): event["metrics"]["loss"] for event in listener.events}


def saved(config: TrainConfig) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint."""
    checkpoint = open_checkpoint(config.checkpoint.uri)
    names = ("weights", "ema", "optimizer")
    return {f"{name}/{key}": value for name in names for key, value in checkpoint.tensors(name).items()}


def tiny_config(table: SampleTable, folder: Path, **changes: Any) -> TrainConfig:
    """Four steps of a network that is compiled in less than a minute."""
    network = {"resolution": 8, "channels": [4], "num_resnets": [1], "num_attention_layers": [0], "num_groups": 2}
    network |= {"num_heads": 1, "time_dim": 8, "mid_blocks": False}
    stage = {"resolution": 8, "images": 32, "global_batch_size": 8, "lr": _LEARNING_RATE}
    return run_config(table, folder, model={"networks": [network]}, stages=[stage], log_every_steps=1, **changes)


def test_bfloat16_computes_near_float32_and_keeps_its_weights_in_it(table: SampleTable, tmp_path: Path) -> None:
    """bfloat16 has 8 bits, of which the means over all pixels of 16 pictures show a part."""
    configs = [
        run_config(table, tmp_path / precision, scaling={"precision": precision})
        for precision in ("float32", "bfloat16")
    ]
    full, half = (train(config, table) for config in configs)
    assert half == pytest.approx(full, rel=1e-3)
    # A network begins by answering next to nothing, which is the same in any precision; after that no two losses are.
    assert {name for name, loss in half.items() if loss == full[name]} <= {(0, 16)}
    weights, reference = (saved(config) for config in reversed(configs))
    assert {name: (value.dtype, value.shape) for name, value in weights.items()} == {
        name: (torch.float32, value.shape) for name, value in reference.items()
    }
    # None was rounded to bfloat16 on its way.
    assert not torch.equal(weights["weights/conv_in.weight"], weights["weights/conv_in.weight"].bfloat16().float())


def test_a_bfloat16_run_that_dies_goes_on_as_if_it_had_not(table: SampleTable, tmp_path: Path) -> None:
    scaling = {"precision": "bfloat16"}
    undisturbed = run_config(table, tmp_path / "undisturbed", scaling=scaling)
    expected = train(undisturbed, table)
    config = run_config(table, tmp_path, scaling=scaling)
    with pytest.raises(KilledError):
        train(config, table, die_after=4)
    assert train(config, table).items() == {((1, 32), expected[1, 32])}
    ours, theirs = saved(config), saved(undisturbed)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_a_compiled_run_is_the_eager_one_and_either_goes_on_with_the_other(table: SampleTable, tmp_path: Path) -> None:
    eager = tiny_config(table, tmp_path / "eager")
    expected = train(eager, table)
    assert len(expected) == 4
    compiled = tiny_config(table, tmp_path / "compiled", scaling={"compile": True})
    with pytest.raises(KilledError):
        train(compiled, table, die_after=3)
    assert saved(compiled).keys() == saved(eager).keys()
    assert open_checkpoint(compiled.checkpoint.uri).manifest.images_seen == 16
    mixed = shutil.copytree(tmp_path / "compiled", tmp_path / "mixed")
    for config in (compiled, tiny_config(table, mixed)):
        left = train(config, table)
        assert left == pytest.approx({name: loss for name, loss in expected.items() if name[1] > 16}, rel=1e-5)
        for name, value in saved(config).items():
            wanted = saved(eager)[name]
            # Adam makes all gradients alike, and of the smallest ones the roundings are a good part.
            atol = 1e-3 * float(wanted.abs().max()) if name.startswith("optimizer/") else _LEARNING_RATE / 100
            torch.testing.assert_close(value, wanted, atol=atol, rtol=1e-4)
