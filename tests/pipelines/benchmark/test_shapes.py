"""The networks that are measured, and what is refused."""

import json

import pytest
import torch

from jobs.benchmark import main
from mdm_core.nested_unet import build_network
from mdm_core.presets import preset
from pipelines.benchmark.config import TrainBenchmarkConfig
from pipelines.benchmark.shapes import shaped


def num_parameters(config):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_network(config).parameters())


def test_without_changes_it_is_the_published_network():
    for name in ("mdm-64", "mdm-256", "mdm-1024"):
        assert TrainBenchmarkConfig(preset=name).matryoshka() == preset(name)
    assert num_parameters(preset("mdm-64")) == 461_359_107


def test_the_smaller_network_has_the_reference_number_of_parameters():
    assert num_parameters(TrainBenchmarkConfig(channels=(64, 128, 192)).matryoshka()) == 25_813_763


def test_text_widths_can_be_set():
    config = TrainBenchmarkConfig(channels=(32, 64), text_dim=40, text_proj_dim=48).matryoshka()
    assert (config.text_dim, config.networks[-1].text_proj_dim) == (40, 48)


def test_shells_shrink_in_proportion_and_keep_whole_groups():
    config = shaped(preset("mdm-1024"), channels=(128, 256, 384))
    # Half of 64, 128, 256; half of 32 would be half a group.
    assert [network.channels for network in config.networks] == [(32, 32, 32), (32, 64, 128), (128, 256, 384)]
    assert {network.time_width for network in config.networks} == {512}


def test_pictures_shrink_together():
    assert shaped(preset("mdm-1024"), resolution=256).resolutions == (256, 64, 16)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "mdm-65"], "--preset: got \"mdm-65\"; wanted 'mdm-64', 'mdm-256' or 'mdm-1024'; did you mean"),
        (["--batch", "0"], "--batch: got 0; wanted 1 or more; the default is 4"),
        (["--channels", "32,60"], "channels=[32, 60]: 60 is not a multiple of num_groups=32"),
        (["--channels", "32,64,64,64"], "channels=[32, 64, 64, 64]: wanted 1 to 3 positive numbers"),
        (["--channels", "thin"], '--channels: got "thin"; wanted a list'),
        (["--preset", "mdm-256", "--resolution", "30"], "resolution=30 must be a multiple of 4"),
        (["--resolution", "18"], "resolution=18 can't be halved 2 times"),
        (["--checkpoint", "64.up.9", "--plan", "true"], "--checkpoint: got 64.up.9; wanted all, none, or some of"),
        (["--chanels", "32,64"], "--chanels: no such flag; did you mean --channels?"),
    ],
)
def test_bad_input_is_refused_with_code_2(capsys, flags, message):
    assert main(["train", *flags, "--json"]) == 2
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith(f"mdm benchmark train: {message}")
    assert json.loads(out)["exit_code"] == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(capsys):
    assert main(["sample", "--channels", "32,64", "--resolution", "16", "--device", "cuda"]) == 2
    expected = "mdm benchmark sample: device=cuda can't be used: PyTorch finds no GPU here; use auto or cpu"
    assert capsys.readouterr().err.splitlines()[-1] == expected


@pytest.mark.parametrize(("words", "fix"), [(["trian"], "did you mean `mdm benchmark train`?"), ([], "as in `mdm")])
def test_an_unknown_benchmark_is_refused(capsys, words, fix):
    assert main(words) == 2
    assert fix in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["sample", "--help"]])
def test_every_benchmark_has_a_help_page(capsys, words):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0
    assert "usage: mdm benchmark" in capsys.readouterr().out
