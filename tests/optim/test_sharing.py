"""Gradients that arrive by other ways than one backward of one model for one optimizer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dcx_kernels as dcx
from dcx_kernels.ops.slot import parameter_slots
from networks import batch, random_sets
from tolerances import assert_exact, assert_gradients_close

SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}


def _first_step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the weights of a dense copy after one step of torch's."""
    twin = copy.deepcopy(model)
    twin(x).square().mean().backward()
    torch.optim.SGD(twin.parameters(), **SGD).step()
    return twin.state_dict()


def test_two_optimizers_share_a_model() -> None:
    """Neither the step nor the zero_grad of one drops the gradients of the other."""
    dense, x, t = batch("chain")
    results = []
    for count in (1, 2):
        model = dcx.convert(dense, x)
        weights = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() == 1]
        shares = [weights + vectors] if count == 1 else [weights, vectors]
        optimizers = [dcx.optim.SGD(model, params=share, **SGD) for share in shares]
        torch.manual_seed(1)
        for _ in range(3):
            model.set_active(random_sets(model))
            F.cross_entropy(model(x), t).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        results.append(model.state_dict())
    for key, tensor in results[0].items():
        assert_exact(results[1][key], tensor, key)


def test_leaves_of_parameters_without_an_optimizer_do_not_pile_up() -> None:
    dense, x, t = batch("chain")
    model = dcx.convert(dense, x)
    optimizer = dcx.optim.SGD(model, params=[model.get_parameter("head.weight")], lr=0.1)
    for _ in range(5):
        model.set_active(random_sets(model))
        F.cross_entropy(model(x), t).backward()
        assert all(len(slot.pending()) == 1 for _, slot in parameter_slots(model))
        optimizer.step()
        assert not any(slot.pending() for _, slot in parameter_slots(model))


@pytest.mark.parametrize("inactive", ["frozen", "decay"])
def test_a_penalty_on_the_parameters_counts(inactive: str) -> None:
    """Its gradient goes to the parameter's own .grad, beside the compact one."""
    dense, x, t = batch("chain")
    results, norms = [], []
    for execution in ("sparse", "mask"):
        model = dcx.convert(dense, x, execution=execution)
        optimizer = dcx.optim.SGD(model, inactive=inactive, **SGD)
        torch.manual_seed(1)
        for _ in range(3):
            model.set_active(random_sets(model))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), t)
            (loss + 0.1 * sum(p.square().sum() for p in model.parameters())).backward()
            norms.append(dcx.clip_grad_norm_(model, 0.5))
            optimizer.step()
        results.append(model.state_dict())
    assert_gradients_close(results[0], results[1])
    assert_gradients_close({"norms": torch.stack(norms[:3])}, {"norms": torch.stack(norms[3:])})


@pytest.mark.parametrize("change", ["dense gradients", "copy", "optimizer"])
def test_the_first_step_after_a_change_is_not_lost(change: str) -> None:
    """Gradients are applied where the forward left them, whatever was asked for since."""
    dense, x, _ = batch("chain")
    expected = _first_step(dense, x)
    model = dcx.convert(dense, x)
    if change == "optimizer":  # the gradient is older than the optimizer
        model(x).square().mean().backward()
    optimizer = dcx.optim.SGD(model, **SGD)
    if change == "dense gradients":
        model.grads = "dense"
    elif change == "copy":
        model, optimizer = copy.deepcopy((model, optimizer))
    if change != "optimizer":
        model(x).square().mean().backward()
    optimizer.step()
    assert_gradients_close(model.state_dict(), expected)


def test_a_pickled_optimizer_steps() -> None:
    dense = nn.Conv2d(3, 4, 3, dtype=torch.float64)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    expected = _first_step(dense, x)
    layer = dcx.SparseChannelConv2d.from_dense(dense)
    layer, optimizer = pickle.loads(pickle.dumps((layer, dcx.optim.SGD(layer, **SGD))))
    layer(x).square().mean().backward()
    optimizer.step()
    assert_gradients_close(layer.state_dict(), expected)


def test_param_groups_show_packed_leaves_while_they_hold_gradients() -> None:
    """Copies, states and loops over "params" outside of a step see parameters only."""
    dense, x, t = batch("chain")
    model = dcx.convert(dense, x)
    optimizer = dcx.optim.SGD(model, **SGD)
    parameters = list(model.parameters())
    before = optimizer.state_dict()
    model.set_active(random_sets(model))
    F.cross_entropy(model(x), t).backward()
    (group,) = optimizer.param_groups
    leaves = group["params"][len(parameters) :]
    assert all(a is b for a, b in zip(group["params"], parameters, strict=False))
    gradients = [gradient.tensor for gradient in model.compact_grads.values()]
    assert [leaf.grad.data_ptr() for leaf in leaves] == [g.data_ptr() for g in gradients]
    assert optimizer.state_dict() == before
    optimizer.load_state_dict(before)
    assert len(copy.deepcopy((model, optimizer))[1].param_groups[0]["params"]) == len(parameters)
    assert len(optimizer.param_groups[0]["params"]) == len(parameters) + len(leaves)
    optimizer.step()
    assert all(a is b for a, b in zip(group["params"], parameters, strict=True))
    assert len(optimizer.param_groups[0]["params"]) == len(parameters)


def test_vectors_that_join_later_start_their_momentum_then() -> None:
    """With dampening a first gradient counts in full: also of a norm that was frozen before."""
    dense, x, t = batch("vgg19")
    settings = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    results = []
    sets = random_sets(dcx.convert(dense, x))
    for execution in ("sparse", "mask"):
        model = dcx.convert(dense, x, execution=execution)
        model.set_active(sets)
        make = dcx.optim.SGD if execution == "sparse" else _torch_sgd
        optimizer = make(model, **settings)
        norm = model.get_submodule("features.1")
        for frozen in (True, False, False):
            for parameter in norm.parameters():
                parameter.requires_grad_(not frozen)
            optimizer.zero_grad()
            F.cross_entropy(model(x), t).backward()
            optimizer.step()
        results.append(model.state_dict())
    assert_gradients_close(*results)


def _torch_sgd(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **settings)
