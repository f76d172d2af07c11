"""Sparse training is masked training, in float64, whatever the sets do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dcx_kernels as dcx
from dcx_kernels.ops.slot import parameter_slots
from networks import NETWORKS, MaskedOracle, batch, random_sets
from tolerances import assert_exact, assert_gradients_close

SGD = {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-3}
VARIANTS = {
    "nesterov": {**SGD, "nesterov": True},
    "dampening": {**SGD, "dampening": 0.3},
    "plain": {"lr": 0.05, "weight_decay": 1e-3},
}
POLICIES = ("keep", "tie", "union")


@pytest.mark.parametrize("inactive", ["frozen", "decay"])
@pytest.mark.parametrize(
    ("network", "variant", "residual"),
    [
        ("vgg19", "nesterov", "keep"),
        *[("chain", name, "keep") for name in VARIANTS],
        *[(name, "nesterov", r) for name in ("residual", "streams") for r in POLICIES],
        ("branches", "nesterov", "keep"),
    ],
)
def test_training_equals_masked_training(
    network: str, inactive: str, variant: str, residual: str
) -> None:
    """Ten steps, new sets of new widths each: outputs, saliency, weights, statistics, state."""
    dense, x, t = batch(network)
    settings = VARIANTS[variant]
    oracle = MaskedOracle(dense, x, lambda p: torch.optim.SGD(p, **settings), inactive, residual)
    model = dcx.convert(dense, x, residual, saliency="sample")
    optimizer = dcx.optim.SGD(model, inactive=inactive, **settings)
    for _ in range(10):
        sets = random_sets(model)
        expected = oracle.step(sets, x, t)
        model.set_active(sets)
        optimizer.zero_grad()
        y = model(x)
        F.cross_entropy(y, t).backward()
        for reduction in ("batch", "sample"):
            assert_gradients_close(model.saliency(reduction), oracle.model.saliency(reduction))
        optimizer.step()
        assert_gradients_close({"logits": y.detach()}, {"logits": expected.detach()})
        packed = {id(slot.parameter) for _, slot in parameter_slots(model)}
        assert packed and all(p.grad is None for p in model.parameters() if id(p) in packed)
    _assert_same_state(model, optimizer, oracle)


@pytest.mark.parametrize("inactive", ["frozen", "decay"])
@pytest.mark.parametrize("network", ["vgg19", "chain", "streams", "branches"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamw_equals_masked_adamw(network: str, amsgrad: bool, inactive: str) -> None:
    dense, x, t = batch(network)
    # a bias before a norm has a true gradient of 0: a small eps would blow up its rounding
    settings = {"lr": 1e-3, "weight_decay": 0.05, "amsgrad": amsgrad, "eps": 1e-4}
    oracle = MaskedOracle(dense, x, lambda p: torch.optim.AdamW(p, **settings), inactive)
    model = dcx.convert(dense, x)
    optimizer = dcx.optim.AdamW(model, inactive=inactive, **settings)
    for _ in range(6):
        sets = random_sets(model)
        oracle.step(sets, x, t)
        model.set_active(sets)
        optimizer.zero_grad()
        F.cross_entropy(model(x), t).backward()
        optimizer.step()
    _assert_same_state(model, optimizer, oracle)


def _assert_same_state(
    model: dcx.ChannelModel, optimizer: torch.optim.Optimizer, oracle: MaskedOracle
) -> None:
    state, expected = model.state_dict(), oracle.model.state_dict()
    assert list(state) == list(expected)
    assert_gradients_close(_floats(state), _floats(expected))
    moments, wanted = optimizer.state_dict(), oracle.optimizer.state_dict()
    assert moments["state"].keys() == wanted["state"].keys()
    for index, entry in wanted["state"].items():
        assert entry.keys() == moments["state"][index].keys()
        assert_gradients_close(_floats(moments["state"][index]), _floats(entry))


def _floats(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t for name, t in tensors.items() if isinstance(t, torch.Tensor)}


@pytest.mark.parametrize("execution", ["sparse", "mask"])
def test_frozen_slices_stay_bitwise(execution: str) -> None:
    """With fixed sets, what is inactive never changes: weights, statistics, momentum."""
    dense, x, t = batch("vgg19")
    model = dcx.convert(dense, x, execution=execution)
    optimizer = dcx.optim.SGD(model, **VARIANTS["nesterov"])
    model.set_active(random_sets(model))
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), t).backward()
        optimizer.step()
    after = model.state_dict()
    active = model.active["features.7"]
    inactive, inputs = ~active.mask(), ~model.active["features.3"].mask()
    weight, old = after["features.7.weight"], before["features.7.weight"]
    assert_exact(weight[inactive], old[inactive])
    assert_exact(weight[:, inputs], old[:, inputs])
    assert not torch.equal(weight, old)
    for name in ("weight", "bias", "running_mean", "running_var"):
        full = f"features.8.{name}"
        assert_exact(after[full][inactive], before[full][inactive])
        assert not torch.equal(after[full], before[full])
    momentum = optimizer.state[model.get_parameter("features.7.weight")]["momentum_buffer"]
    assert not momentum[inactive].any() and not momentum[:, inputs].any() and momentum.any()


def test_dense_gradients_equal_the_masked_ones() -> None:
    """Without a dcx optimizer .grad is dense, zeros outside the active slice: torch.optim works."""
    for network in NETWORKS:
        dense, x, t = batch(network)
        sparse = dcx.convert(dense, x)
        masked = dcx.convert(dense, x, execution="mask")
        sets = random_sets(sparse)
        gradients = []
        for model in (sparse, masked):
            model.set_active(sets)
            F.cross_entropy(model(x), t).backward()
            gradients.append({n: p.grad for n, p in model.named_parameters()})
        assert_gradients_close(gradients[0], gradients[1])
        torch.optim.SGD(sparse.parameters(), lr=0.1).step()


@pytest.mark.parametrize("make", [dcx.optim.SGD, dcx.optim.AdamW])
@pytest.mark.parametrize("inactive", ["frozen", "decay"])
def test_accumulation_over_different_sets_equals_masked(inactive: str, make: Any) -> None:
    """Two backward passes with different sets before one step: promoted, exact."""
    dense, x, t = batch("chain")
    settings = VARIANTS["nesterov"] if make is dcx.optim.SGD else {"lr": 1e-3, "eps": 1e-4}
    results = []
    for execution in ("sparse", "mask"):
        model = dcx.convert(dense, x, execution=execution)
        optimizer = make(model, inactive=inactive, **settings)
        torch.manual_seed(3)
        for _ in range(3):
            optimizer.zero_grad()
            for half in (slice(0, 3), slice(3, 6)):
                model.set_active(random_sets(model))
                (F.cross_entropy(model(x[half]), t[half]) / 2).backward()
            optimizer.step()
        results.append(model.state_dict())
    assert_gradients_close(results[0], results[1])


def test_backward_uses_the_sets_of_its_forward() -> None:
    dense, x, t = batch("chain")
    gradients = []
    for change in (False, True):
        model = dcx.convert(dense, x)
        optimizer = dcx.optim.SGD(model, lr=0.1, momentum=0.9)
        torch.manual_seed(1)
        first, second = random_sets(model), random_sets(model)
        model.set_active(first)
        loss = F.cross_entropy(model(x), t)
        if change:
            model.set_active(second)
        loss.backward()
        gradients.append({n: g.tensor for n, g in model.compact_grads.items()})
        optimizer.step()
        gradients.append(model.state_dict())
    assert_gradients_close(gradients[2], gradients[0])
    assert_gradients_close(gradients[3], gradients[1])


def test_nan_in_inactive_channels_goes_nowhere() -> None:
    """The headline: what does not exist cannot poison. The masked network turns all NaN."""
    dense, x, t = batch("vgg19")
    finite = {}
    for execution in ("sparse", "mask"):
        model = dcx.convert(dense, x, execution=execution)
        model.set_active(random_sets(model))
        for name, active in model.active.items():
            gone = ~active.mask()
            for member in model.groups[name].members:
                layer = model.get_submodule(member.module)
                for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
                    if tensor.dim() and member.role != "consumer":
                        tensor.data[gone] = float("nan")
                    elif tensor.dim() > 1:
                        tensor.data[:, gone.repeat_interleave(member.inner)] = float("nan")
        optimizer = dcx.optim.SGD(model, **VARIANTS["nesterov"])
        before = {n: torch.isnan(v).sum().item() for n, v in model.state_dict().items()}
        y = model(x)
        F.cross_entropy(y, t).backward()
        optimizer.step()
        after = {n: torch.isnan(v).sum().item() for n, v in model.state_dict().items()}
        saliency = all(s.isfinite().all() for s in model.saliency().values())
        evaluated = model.eval()(x).isfinite().all()
        finite[execution] = bool(y.isfinite().all() and evaluated and saliency and before == after)
        assert sum(before.values()) > 0
    assert finite == {"sparse": True, "mask": False}


def test_outputs_at_full_density_are_bitwise_those_of_the_dense_model() -> None:
    for network in NETWORKS:
        dense, x, _ = batch(network)
        dense, x = dense.float().eval(), x.float()
        model = dcx.convert(dense, x)
        assert_exact(model(x), dense(x))
