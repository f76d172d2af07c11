"""Averaged copies of a converted network: torch.optim.swa_utils and copy.deepcopy."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import dcx_kernels as dcx
from networks import MaskedOracle, batch, random_sets
from tolerances import assert_exact, assert_gradients_close

SGD = {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-3}
DECAY = 0.7


def _step(model: dcx.ChannelModel, optimizer: torch.optim.Optimizer, x: Tensor, t: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), t).backward()
    optimizer.step()


def _floats(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict().items()
    return {key: value.clone() for key, value in state if value.is_floating_point()}


def test_ema_is_the_ema_of_the_masked_network() -> None:
    """Weights and running statistics, while the sets change; the averaged model then runs."""
    dense, x, t = batch("vgg19")
    oracle = MaskedOracle(dense, x, lambda p: torch.optim.SGD(p, **SGD), "frozen")
    model = dcx.convert(dense, x)
    optimizer = dcx.optim.SGD(model, **SGD)
    average = get_ema_multi_avg_fn(DECAY)
    ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    masked = AveragedModel(oracle.model, multi_avg_fn=average, use_buffers=True)
    for _ in range(4):
        sets = random_sets(model)
        oracle.step(sets, x, t)
        model.set_active(sets)
        _step(model, optimizer, x, t)
        ema.update_parameters(model)
        masked.update_parameters(oracle.model)
    assert_gradients_close(_floats(ema.module), _floats(masked.module))
    for averaged in (ema, masked):
        averaged.eval().module.set_active(sets)
    with torch.no_grad():
        assert_gradients_close({"logits": ema(x)}, {"logits": masked(x)})
    back = dcx.revert(ema.module)
    for key, value in ema.module.state_dict().items():
        assert_exact(back.state_dict()[key], value, key)


@pytest.mark.parametrize("how", ["deepcopy", "ema"])
@pytest.mark.parametrize("when", ["after forward", "after backward"])
def test_a_copy_neither_disturbs_the_training_nor_shares_with_it(how: str, when: str) -> None:
    """Not even one made between forward and step, that runs, learns and changes its own sets."""
    dense, x, t = batch("vgg19")
    results = []
    for copied in (False, True):
        model = dcx.convert(dense, x)
        optimizer = dcx.optim.SGD(model, **SGD)
        torch.manual_seed(1)
        for _ in range(3):
            model.set_active(random_sets(model))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), t)
            if copied and when == "after forward":
                _use_a_copy(model, x, t, how)
            loss.backward()
            if copied and when == "after backward":
                _use_a_copy(model, x, t, how)
            measured = model.saliency()
            optimizer.step()
        results.append({**model.state_dict(), **{f"saliency {k}": v for k, v in measured.items()}})
    for key, value in results[0].items():
        assert_exact(results[1][key], value, key)


def _use_a_copy(model: dcx.ChannelModel, x: Tensor, t: Tensor, how: str) -> None:
    random = torch.get_rng_state()
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
        ema.update_parameters(model)
        twin = ema.module
    assert not twin.compact_grads
    optimizer = dcx.optim.SGD(twin, lr=0.5)
    for sets in (twin.active, random_sets(twin)):  # the first equal those of the original
        twin.set_active(sets)
        _step(twin, optimizer, x, t)
    torch.set_rng_state(random)


def test_a_copy_trains_like_the_original() -> None:
    dense, x, t = batch("vgg19")
    model = dcx.convert(dense, x)
    optimizer = dcx.optim.SGD(model, **SGD)
    model.set_active(random_sets(model))
    _step(model, optimizer, x, t)
    twin, other = copy.deepcopy((model, optimizer))
    assert twin.active == model.active
    sets = random_sets(model)
    for network, its_optimizer in ((model, optimizer), (twin, other)):
        network.set_active(sets)
        _step(network, its_optimizer, x, t)
    # a copy begins with dense gradients: the same sums, of other lengths
    assert_gradients_close(_floats(twin), _floats(model))


@pytest.mark.parametrize("averaged", [False, True])
def test_update_bn_takes_the_statistics_of_active_channels(averaged: bool) -> None:
    """Those of the others start anew, as torch resets them, and wait for their own forward."""
    dense, x, t = batch("vgg19")
    sets = None
    results: list[tuple[nn.Module, dcx.ChannelModel]] = []
    for execution in ("sparse", "mask"):
        model = dcx.convert(dense, x, execution=execution)
        sets = random_sets(model) if sets is None else sets
        model.set_active(sets)
        network: nn.Module = model
        if averaged:
            network = AveragedModel(model)
            network.update_parameters(model)
            model = network.module
        loader: Iterable[object] = [(x[:4], t[:4]), (x[4:] * 3 + 1, t[4:])]
        network.eval()
        update_bn(loader, network)
        assert not network.training
        results.append((network, model))
    (network, model), (masked_network, masked) = results
    counted = 0
    for name, layer in masked.named_modules():
        if not isinstance(layer, nn.BatchNorm2d):
            continue
        mine = model.get_submodule(name)
        assert mine.momentum == layer.momentum == 0.1
        assert_exact(mine.num_batches_tracked, layer.num_batches_tracked, name)
        on = mine.out_active.mask()
        for statistic, reset in (("running_mean", 0.0), ("running_var", 1.0)):
            value, expected = getattr(mine, statistic), getattr(layer, statistic)
            assert_gradients_close({name: value[on]}, {name: expected[on]})
            assert (value[~on] == reset).all()
        counted += 1
    assert counted == 16
    with torch.no_grad():
        assert_gradients_close({"logits": network(x)}, {"logits": masked_network(x)})
