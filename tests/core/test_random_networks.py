"""Any network a configuration can describe computes, and differentiates, as the plain implementation does."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mdm_core.config import MatryoshkaConfig
from mdm_core.nested_unet import build_network
from tests.core.network_strategies import VIDEOS, Inputs, Video, networks_and_inputs, randomize
from tests.core.plain_networks import plain_forward

EXAMPLES = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@EXAMPLES
@given(networks_and_inputs())
def test_random_network_is_its_plain_twin(case: tuple[MatryoshkaConfig, Inputs]) -> None:
    compare(*case)


@pytest.mark.parametrize("shell", VIDEOS)
@EXAMPLES
@given(data=st.data())
def test_random_shells_are_their_plain_twins(shell: Video, data: st.DataObject) -> None:
    compare(*data.draw(networks_and_inputs(shell)))


def compare(config: MatryoshkaConfig, inputs: Inputs) -> None:
    """Outputs, with and without a graph, and the gradient of every parameter agree with the plain implementation."""
    network = build_network(config).double()
    randomize(list(network.parameters()), inputs.seed)
    state = {key: value.detach().clone() for key, value in network.state_dict().items()}
    names = [key for key, parameter in network.named_parameters() if parameter.requires_grad]
    text = (inputs.text_emb, inputs.text_mask)

    outputs = network(inputs.x_t, inputs.timestep, *text, labels=inputs.labels, micros=inputs.micros)
    with torch.no_grad():
        sampled = network.eval()(inputs.x_t, inputs.timestep, *text, labels=inputs.labels, micros=inputs.micros)
    twins = [state[name].requires_grad_() for name in names]
    expected = plain_forward(config, state, inputs.x_t, inputs.timestep, *text, inputs.labels, inputs.micros)
    assert len(outputs) == len(expected) == len(inputs.x_t)
    for output, without_graph, y in zip(outputs, sampled, expected, strict=True):
        torch.testing.assert_close(output, y, atol=1e-10, rtol=0)
        torch.testing.assert_close(without_graph, y, atol=1e-10, rtol=0)

    parameters = dict(network.named_parameters())
    grads = gradients(outputs, [parameters[name] for name in names], inputs.seed)
    for name, grad, other in zip(names, grads, gradients(expected, twins, inputs.seed), strict=True):
        error = float((grad - other).abs().max())
        assert error <= 1e-9 * max(1.0, float(other.abs().max())), f"gradient of {name}: off by {error}"


def gradients(outputs: list[Tensor], parameters: list[Tensor], seed: int) -> list[Tensor]:
    """Gradients of a random linear functional of the outputs; 0 for a parameter that had no part in them."""
    generator = torch.Generator().manual_seed(seed + 1)
    functional = torch.stack(
        [(y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum() for y in outputs]
    ).sum()
    grads = torch.autograd.grad(functional, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)]
