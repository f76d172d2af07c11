"""dcx.optim is torch.optim in everything but what it touches (updates: tests/graph)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dcx_kernels as dcx
from dcx_kernels.ops.slot import parameter_slots
from networks import Chain, batch, random_sets
from tolerances import assert_exact, assert_gradients_close

PAIRS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sgd": (dcx.optim.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
    "sgd-plain": (dcx.optim.SGD, torch.optim.SGD, {"lr": 0.1}),
    "adamw": (dcx.optim.AdamW, torch.optim.AdamW, {"lr": 1e-3}),
    "amsgrad": (dcx.optim.AdamW, torch.optim.AdamW, {"lr": 1e-3, "amsgrad": True}),
}
ALL = pytest.mark.parametrize("pair", list(PAIRS))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Any, t: Any) -> None:
    """Take one training step."""
    optimizer.zero_grad()
    F.cross_entropy(model(x), t).backward()
    optimizer.step()


@ALL
def test_models_without_sparse_layers_train_as_with_torch(pair: str) -> None:
    ours, torchs, settings = PAIRS[pair]
    dense, x, t = batch("chain")
    twin = copy.deepcopy(dense)
    optimizers = (ours(dense, **settings), torchs(twin.parameters(), **settings))
    for _ in range(3):
        step(dense, optimizers[0], x, t)
        step(twin, optimizers[1], x, t)
    assert_gradients_close(dense.state_dict(), twin.state_dict())


@ALL
def test_state_dict_moves_to_torch_and_back(pair: str) -> None:
    """Same keys, same shapes: a run may go on with torch.optim on the reverted network."""
    ours, torchs, settings = PAIRS[pair]
    dense, x, t = batch("vgg19")
    model = dcx.convert(dense, x)
    optimizer = ours(model, **settings)
    for _ in range(2):
        model.set_active(random_sets(model))
        step(model, optimizer, x, t)
    state = optimizer.state_dict()
    back = dcx.revert(model)
    other = torchs(back.parameters(), **settings)
    step(back, other, x, t)
    assert state["state"].keys() == other.state_dict()["state"].keys()
    for index, entry in other.state_dict()["state"].items():
        assert entry.keys() == state["state"][index].keys()
        for key, value in entry.items():
            assert value.shape == state["state"][index][key].shape
    groups = state["param_groups"][0], other.state_dict()["param_groups"][0]
    assert groups[0].keys() >= groups[1].keys() - {"decoupled_weight_decay"}
    other.load_state_dict(state)
    again = ours(model, **settings)
    again.load_state_dict(other.state_dict())
    step(model, again, x, t)


@ALL
def test_resumed_state_continues_bit_identically(pair: str) -> None:
    ours, _, settings = PAIRS[pair]
    dense, x, t = batch("chain")
    model = dcx.convert(dense, x)
    optimizer = ours(model, **settings)
    sets = [random_sets(model) for _ in range(4)]
    for chosen in sets[:2]:
        model.set_active(chosen)
        step(model, optimizer, x, t)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    resumed = dcx.convert(dense, x)
    resumed.load_state_dict(saved[0])
    resumed_optimizer = ours(resumed, **settings)
    resumed_optimizer.load_state_dict(saved[1])
    for chosen in sets[2:]:
        for network, opt in ((model, optimizer), (resumed, resumed_optimizer)):
            network.set_active(chosen)
            step(network, opt, x, t)
    for name, tensor in model.state_dict().items():
        assert_exact(resumed.state_dict()[name], tensor, name)


def test_param_groups_have_their_own_settings() -> None:
    dense, x, t = batch("chain")
    results = []
    for execution in ("sparse", "mask"):
        model = dcx.convert(dense, x, execution=execution)
        decayed = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 0.0}]
        optimizer = dcx.optim.SGD(model, lr=0.1, params=groups)
        torch.manual_seed(1)
        model.set_active(random_sets(model))
        step(model, optimizer, x, t)
        results.append(model.state_dict())
        assert_exact(results[-1]["norm.weight"], dense.norm.weight.detach())
        assert not torch.equal(results[-1]["stem.weight"], dense.stem.weight)
    assert_gradients_close(results[0], results[1])


def test_schedulers_and_closures_of_torch_work() -> None:
    dense, x, t = batch("chain")
    model = dcx.convert(dense, x)
    optimizer = dcx.optim.SGD(model, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), t)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_zero_grad_drops_compact_gradients() -> None:
    dense, x, t = batch("chain")
    model = dcx.convert(dense, x)
    optimizer = dcx.optim.SGD(model, lr=0.1)
    for clear in (optimizer.zero_grad, model.zero_grad):
        F.cross_entropy(model(x), t).backward()
        assert model.compact_grads
        clear()
        assert not model.compact_grads
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    for name, tensor in model.state_dict().items():
        assert_exact(tensor, before[name], name)


def test_a_parameter_changed_between_forward_and_step_keeps_the_change() -> None:
    dense, x, t = batch("chain")
    results = []
    for execution in ("sparse", "mask"):
        model = dcx.convert(dense, x, execution=execution)
        optimizer = dcx.optim.SGD(model, lr=0.1, momentum=0.9)
        torch.manual_seed(1)
        model.set_active(random_sets(model))
        F.cross_entropy(model(x), t).backward()
        with torch.no_grad():
            model.get_parameter("stem.weight").mul_(2.0)
        optimizer.step()
        results.append(model.state_dict())
    assert_gradients_close(results[0], results[1])


def test_dense_gradients_on_request_give_the_same_training() -> None:
    dense, x, t = batch("chain")
    results = []
    for grads in ("compact", "dense"):
        model = dcx.convert(dense, x)
        model.grads = grads
        optimizer = dcx.optim.SGD(model, lr=0.1, momentum=0.9, weight_decay=1e-2)
        torch.manual_seed(1)
        for _ in range(3):
            model.set_active(random_sets(model))
            optimizer.zero_grad()
            F.cross_entropy(model(x), t).backward()
            assert (model.get_parameter("stem.weight").grad is None) == (grads == "compact")
            optimizer.step()
        results.append(model.state_dict())
    assert_gradients_close(results[0], results[1])


def test_storage_of_packed_weights_is_reused() -> None:
    dense, x, t = batch("chain")
    model = dcx.convert(dense, x)
    optimizer = dcx.optim.SGD(model, lr=0.1)
    slot = dict(parameter_slots(model))["down.weight"]
    pointers = set()
    for _ in range(3):
        sets = {n: dcx.ChannelSet(torch.randperm(s.num_channels)[:3], s.num_channels)
                for n, s in model.active.items()}  # fmt: skip
        model.set_active(sets)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), t)
        pointers.add(slot.leaf().data_ptr())
        loss.backward()
        optimizer.step()
    assert len(pointers) == 1


@pytest.mark.parametrize("norm_type", [2.0, float("inf"), 1.0])
@pytest.mark.parametrize("max_norm", [0.05, 1e6])
def test_clip_equals_torch_on_the_masked_network(norm_type: float, max_norm: float) -> None:
    dense, x, t = batch("chain")
    sparse = dcx.convert(dense, x)
    masked = dcx.convert(dense, x, execution="mask")
    dcx.optim.SGD(sparse, lr=0.1)
    sets = random_sets(sparse)
    for model in (sparse, masked):
        model.set_active(sets)
        F.cross_entropy(model(x), t).backward()
    ours = dcx.clip_grad_norm_(sparse, max_norm, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(masked.parameters(), max_norm, norm_type)
    assert_gradients_close({"norm": ours}, {"norm": expected})
    slots = dict(parameter_slots(sparse))
    clipped, wanted = {}, {}
    for name, gradient in sparse.compact_grads.items():
        rows, full = slots[name].rows(), masked.get_parameter(name).grad
        assert full is not None
        clipped[name] = gradient.tensor
        wanted[name] = full if rows is None else rows.gather(full)
    assert_gradients_close(clipped, wanted)


def test_clip_errors() -> None:
    dense, x, t = batch("chain")
    model = dcx.convert(dense, x)
    optimizer = dcx.optim.SGD(model, lr=0.1)
    assert dcx.clip_grad_norm_(model, 1.0) == 0
    with pytest.raises(ValueError, match="expected max_norm >= 0, got -1"):
        dcx.clip_grad_norm_(model, -1.0)
    (F.cross_entropy(model(x), t) * float("nan")).backward()
    with pytest.raises(dcx.NonFiniteError, match="expected a finite gradient norm, got nan"):
        dcx.clip_grad_norm_(model, 1.0, error_if_nonfinite=True)
    optimizer.zero_grad()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: dcx.optim.SGD(m, lr=-1.0), ValueError, "expected lr >= 0, got -1"),
        (lambda m: dcx.optim.SGD(m, momentum=-0.1), ValueError, "expected momentum >= 0"),
        (
            lambda m: dcx.optim.SGD(m, lr=torch.ones(2)),
            ValueError,
            "a tensor lr of 1 element, got 2",
        ),
        (lambda m: dcx.optim.AdamW(m, lr=torch.ones(2)), ValueError, "a tensor lr of 1 element"),
        (lambda m: dcx.optim.SGD(m, lr=float("nan")), ValueError, "expected lr >= 0, got nan"),
        (
            lambda m: dcx.optim.AdamW(m, weight_decay=float("nan")),
            ValueError,
            "decay >= 0, got nan",
        ),
        (lambda m: dcx.optim.SGD(m, nesterov=True), ValueError, "expected momentum > 0"),
        (lambda m: dcx.optim.SGD(m, inactive="none"), ValueError, "'frozen' or 'decay', got 'none"),
        (lambda m: dcx.optim.SGD(m.parameters()), TypeError, "expected a module first"),
        (lambda m: dcx.optim.AdamW(m, betas=(1.0, 0.9)), ValueError, "expected beta 0 in"),
        (lambda m: dcx.optim.AdamW(m, eps=-1.0), ValueError, "expected eps >= 0"),
        (lambda m: dcx.optim.AdamW(m, inactive="none"), ValueError, "'frozen' or 'decay', got 'no"),
    ],
)
def test_bad_settings_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(Chain())
