"""Costs are what torch itself counts on the thin network."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dcx_kernels as dcx
from dcx_kernels.models import vgg19
from networks import NETWORKS, batch, random_sets


@pytest.mark.parametrize("execution", ["sparse", "mask"])
@pytest.mark.parametrize("network", list(NETWORKS))
def test_cost_equals_what_torch_counts_of_the_thin_network(network: str, execution: str) -> None:
    dense, x, _ = batch(network)
    model = dcx.convert(dense, x, execution=execution)
    for _ in range(3):
        model.set_active(random_sets(model))
        thin = dcx.compact(model).eval()
        cost = dcx.cost(model)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            thin(x)
        assert cost.macs == counter.get_total_flops() // 2 // x.shape[0]
        assert cost.params == sum(p.numel() for p in thin.parameters())
        again = dcx.cost(thin, x)  # a graph holds its layers in the order of their calls
        assert set(cost.layers) == set(again.layers) and cost.params == again.params
        assert cost.other_params == again.other_params and cost.other_macs == again.other_macs == 0


@pytest.mark.parametrize("network", ["vgg19", "chain"])
def test_a_sparse_step_does_the_macs_of_the_thin_step(network: str) -> None:
    """The operators' own FLOP formulas, forward and backward.

    Not with grouped convolutions: torch counts their weight gradient as if it had one group.
    """
    dense, x, _ = batch(network)
    model = dcx.convert(dense, x, saliency=None)
    model.set_active(random_sets(model))
    flops = []
    for network_ in (model, dcx.compact(model)):
        with FlopCounterMode(display=False) as counter:
            network_(x).sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


def test_cost_counts_activation_bytes_of_active_channels() -> None:
    model = dcx.convert(vgg19(width=1 / 16), torch.zeros(1, 3, 32, 32))
    model.set_active({"features.0": dcx.ChannelSet([1, 2, 3], 4)})
    layers = {layer.name: layer for layer in dcx.cost(model).layers}
    assert layers["features.0"].activation_bytes == 3 * 32 * 32 * 4
    assert layers["features.0"].out_active == layers["features.3"].in_active == 3
    assert layers["features.0"].macs == 3 * 3 * 9 * 32 * 32
    assert layers["features.1"].params == 6
    assert sum(layer.params for layer in layers.values()) == dcx.cost(model).params


def test_cost_of_vgg19_agrees_with_the_paper() -> None:
    """DCE, Table 1: 20.035e6 parameters, 3.98e8 multiply-accumulates."""
    cost = dcx.cost(vgg19(), torch.zeros(1, 3, 32, 32))
    assert cost.params == 20_035_018
    assert abs(cost.macs - 3.98e8) / 3.98e8 < 0.02
