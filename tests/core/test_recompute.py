"""What is computed again in the backward pass gives the gradients of what was kept."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mdm_core.config import MatryoshkaConfig, UNetConfig
from mdm_core.nested_unet import build_network
from mdm_core.recompute import conv_after, linear_after

ACTIVATIONS = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "upsample": lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3),
}
CHECKPOINTED = MatryoshkaConfig(
    (
        UNetConfig(
            resolution=16, channels=(8, 16), num_resnets=(1, 1), num_attention_layers=(0, 0), time_dim=32,
            mid_blocks=False, num_groups=4, num_heads=2,
        ),
        UNetConfig(
            resolution=8, channels=(8, 16), num_resnets=(1, 1), num_attention_layers=(0, 1), time_dim=32, text_dim=8,
            num_groups=4, num_heads=2,
        ),
    )
)  # fmt: skip


def randomised(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


@pytest.mark.parametrize(
    ("kernel", "stride", "activation", "with_norm", "with_scale", "threads"),
    [
        (kernel, stride, activation, with_norm, with_scale, threads)
        for kernel, stride, activation, with_norm, with_scale, threads in itertools.product(
            (1, 3), (1, 2), ACTIVATIONS, (False, True), (False, True), (1, 2)
        )
        if not (stride == 2 and kernel == 1) and not (with_scale and not with_norm)
    ],
)
def test_conv_after_is_its_definition(kernel, stride, activation, with_norm, with_scale, threads):
    conv = randomised(nn.Conv2d(8, 6, kernel, stride=stride, padding=kernel // 2)).to(memory_format=torch.channels_last)
    norm = randomised(nn.GroupNorm(4, 8)) if with_norm else None
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 8, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last).requires_grad_()
    scale, shift = torch.randn(2, 2, 8, 1, 1, generator=generator).requires_grad_().unbind(0)
    leaves = [x, *conv.parameters(), *(norm.parameters() if norm else ()), *((scale, shift) if with_scale else ())]
    modulation = {"scale": scale, "shift": shift} if with_scale else {}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = conv_after(conv, x, norm=norm, activation=activation, **modulation)
    finally:
        torch.set_num_threads(before)
    h = norm(x) if norm else x
    wanted = conv(ACTIVATIONS[activation](h * (1 + scale) + shift if with_scale else h))
    weights = torch.randn(wanted.shape, generator=generator)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad((got * weights).sum(), leaves), torch.autograd.grad((wanted * weights).sum(), leaves),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [2, 3])
def test_linear_after_is_its_definition(rows):
    linear, norm = randomised(nn.Linear(6, 10)), randomised(nn.LayerNorm(6))
    x = torch.randn(rows, 8, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    leaves = [x, *linear.parameters(), *norm.parameters()]
    got, wanted = linear_after(linear, x, norm=norm), linear(norm(x))
    torch.testing.assert_close(got, wanted)
    for ours, theirs in zip(
        torch.autograd.grad(got.square().sum(), leaves), torch.autograd.grad(wanted.square().sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_frozen_weights_get_no_gradient_and_let_it_through():
    conv, norm = randomised(nn.Conv2d(4, 4, 1)), randomised(nn.GroupNorm(2, 4))
    conv.requires_grad_(False)
    norm.bias.requires_grad_(False)
    x = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
    conv_after(conv, x, norm=norm, activation="silu").square().sum().backward()
    assert conv.weight.grad is None
    assert norm.bias.grad is None
    wanted = torch.autograd.grad(conv(F.silu(norm(x))).square().sum(), [x, norm.weight])
    torch.testing.assert_close(x.grad, wanted[0])
    torch.testing.assert_close(norm.weight.grad, wanted[1])


def test_autocast_gives_the_gradients_of_plain_autocast():
    conv, norm = randomised(nn.Conv2d(8, 8, 3, padding=1)), randomised(nn.GroupNorm(4, 8))
    x = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    found = []
    for function in (lambda: conv_after(conv, x, norm=norm, activation="silu"), lambda: conv(F.silu(norm(x)))):
        conv.zero_grad()
        norm.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = function()
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        found.append([parameter.grad for parameter in (*conv.parameters(), *norm.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=0.5, rtol=0.02)


def kept_bytes(function):
    """Bytes of all tensors kept for the backward pass, each storage once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values())


def test_only_the_input_is_kept():
    conv, norm = nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(4, 8)
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    parameters = sum(p.nbytes for p in (conv.weight, norm.weight, norm.bias))
    assert kept_bytes(lambda: conv_after(conv, x, norm=norm, activation="silu")) == x.nbytes + parameters
    assert kept_bytes(lambda: conv(F.silu(norm(x)))) > 3 * x.nbytes


def test_checkpointed_levels_keep_less_and_give_the_same_gradients():
    network = randomised(build_network(CHECKPOINTED))
    generator = torch.Generator().manual_seed(1)
    x_t = [torch.randn(2, 3, side, side, generator=generator) for side in (16, 8)]
    timestep, text = torch.tensor([3, 900]), torch.randn(2, 5, 8, generator=generator)

    def run(names):
        network.checkpoint_levels(names)
        network.zero_grad()
        outputs = []
        kept = kept_bytes(lambda: outputs.extend(network(x_t, timestep, text)))
        sum(output.square().mean() for output in outputs).backward()
        return kept, {name: p.grad.clone() for name, p in network.named_parameters()}

    kept_all, gradients = run([])
    kept_outer, gradients_outer = run([name for name in network.levels() if name.startswith("16.")])
    kept_none, gradients_none = run(network.levels())
    assert kept_none < kept_outer < kept_all
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_outer[name], gradient)
        torch.testing.assert_close(gradients_none[name], gradient)


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match=r"no level '64.mid' in this network; there are 16.down.0, 16.down.1, 16.up.1"):
        build_network(CHECKPOINTED).checkpoint_levels(["64.mid"])
