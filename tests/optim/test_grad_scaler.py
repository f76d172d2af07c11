"""torch.amp.GradScaler finds compact gradients, and skips a step as in torch's masked loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dcx_kernels as dcx
from dcx_kernels.optim import scaled_step
from networks import MaskedOracle, batch, random_sets
from tolerances import assert_close_to_float64, assert_exact, assert_gradients_close

SETTINGS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-3},
    "AdamW": {"lr": 1e-3, "eps": 1e-4, "amsgrad": True},
}
BOTH = pytest.mark.parametrize("name", list(SETTINGS))
MODES = ("compact", "dense", "promoted", "penalty")
SCALER: dict[str, Any] = {"device": "cpu", "init_scale": 2.0**60, "growth_interval": 2}
MAX_NORM = 0.5
DTYPES = (torch.float32, torch.float64)

Sets = dict[str, dcx.ChannelSet]


def _backward(
    model: dcx.ChannelModel,
    scaler: torch.amp.GradScaler,
    sets: list[Sets],
    x: Tensor,
    t: Tensor,
    factor: float = 1.0,
    penalty: float = 0.0,
) -> None:
    """Add up the scaled gradients of one forward a set."""
    for chosen in sets:
        model.set_active(chosen)
        loss = F.cross_entropy(model(x), t) * factor
        if penalty:
            loss = (
                loss + penalty * torch.stack([p.square().sum() for p in model.parameters()]).sum()
            )
        scaler.scale(loss).backward()


class ScaledOracle(MaskedOracle):
    """The masked loop with torch's optimizer and scaler; entries that no set activates go back."""

    def __init__(self, network: nn.Module, x: Tensor, name: str) -> None:
        make = getattr(torch.optim, name)
        super().__init__(network, x, lambda p: make(p, **SETTINGS[name]), "frozen")
        self.scaler = torch.amp.GradScaler(**SCALER)

    def scaled_step(
        self, sets: list[Sets], x: Tensor, t: Tensor, clip: bool, **options: float
    ) -> None:
        """Train one step, over one set or over several."""
        self.optimizer.zero_grad()
        masks: dict[str, Tensor] = {}
        for chosen in sets:
            _backward(self.model, self.scaler, [chosen], x, t, **options)
            for name, parameter in self.model.named_parameters():
                mask = self._mask(name, parameter)
                masks[name] = masks[name] | mask if name in masks else mask
        before = {name: self._tensors(p) for name, p in self.model.named_parameters()}
        if clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                for key, tensor in self._tensors(parameter, clone=False).items():
                    old = before[name].get(key, torch.zeros_like(tensor))
                    tensor.copy_(torch.where(masks[name], tensor, old))


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = copy.deepcopy(optimizer.state_dict()["state"])
    return {f"{i} {key}": value for i, entry in state.items() for key, value in entry.items()}


def _assert_exact_all(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert_exact(actual[key], tensor, key)


@BOTH
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clip", [False, True])
def test_scaled_training_equals_scaled_masked_training(name: str, mode: str, clip: bool) -> None:
    """The first step, with no state yet, and the fourth overflow."""
    dense, x, t = batch("vgg19")
    oracle = ScaledOracle(dense, x, name)
    model = dcx.convert(dense, x)
    model.grads = "dense" if mode == "dense" else "compact"
    optimizer = getattr(dcx.optim, name)(model, **SETTINGS[name])
    scaler = torch.amp.GradScaler(**SCALER)
    options = {"penalty": 1e-3 if mode == "penalty" else 0.0}
    for count in range(6):
        sets = [random_sets(model) for _ in range(2 if mode == "promoted" else 1)]
        options["factor"] = torch.finfo(x.dtype).max if count in (0, 3) else 1.0
        oracle.scaled_step(sets, x, t, clip, **options)
        optimizer.zero_grad()
        _backward(model, scaler, sets, x, t, **options)
        before = _parameters(model), _state(optimizer)
        if clip:
            scaler.unscale_(optimizer)
            dcx.clip_grad_norm_(model, MAX_NORM)
        assert scaled_step(scaler, optimizer) == (count not in (0, 3))
        scaler.update()
        assert scaler.state_dict() == oracle.scaler.state_dict()
        if count in (0, 3):
            _assert_exact_all(_parameters(model), before[0])
            _assert_exact_all(_state(optimizer), before[1])
    assert_gradients_close(_parameters(model), _parameters(oracle.model))
    assert_gradients_close(_state(optimizer), _state(oracle.optimizer))


def test_scaled_training_in_float32() -> None:
    dense, x, t = batch("vgg19")
    model = dcx.convert(dense.float(), x.float())
    oracles = [ScaledOracle(copy.deepcopy(dense).to(d), x.to(d), "SGD") for d in DTYPES]
    optimizer = dcx.optim.SGD(model, **SETTINGS["SGD"])
    scaler = torch.amp.GradScaler(**SCALER)
    for count in range(3):
        sets = [random_sets(model)]
        factor = torch.finfo(torch.float64).max if count == 1 else 1.0
        for dtype, oracle in zip(DTYPES, oracles, strict=True):
            oracle.scaled_step(sets, x.to(dtype), t, clip=False, factor=factor)
        optimizer.zero_grad()
        _backward(model, scaler, sets, x.float(), t, factor)
        assert scaled_step(scaler, optimizer) == (count != 1)
        scaler.update()
        assert scaler.state_dict() == oracles[0].scaler.state_dict()
    torchs, truth = (_parameters(oracle.model) for oracle in oracles)
    for key, weight in _parameters(model).items():
        assert_close_to_float64(weight, torchs[key], truth[key], key)


@BOTH
def test_a_scale_that_is_a_power_of_two_changes_no_bit(name: str) -> None:
    """In float32 AdamW divides rounding by rounding: torch's masked loop cannot be the judge."""
    dense, x, t = batch("vgg19")
    x = x.float()
    results = []
    for enabled in (False, True):
        model = dcx.convert(dense.float(), x)
        optimizer = getattr(dcx.optim, name)(model, **SETTINGS[name])
        scaler = torch.amp.GradScaler(**SCALER, enabled=enabled)
        torch.manual_seed(1)
        for _ in range(3):
            optimizer.zero_grad()
            _backward(model, scaler, [random_sets(model) for _ in range(2)], x, t)
            assert scaled_step(scaler, optimizer)
            scaler.update()
        results.append((_parameters(model), _state(optimizer)))
    _assert_exact_all(results[1][0], results[0][0])
    _assert_exact_all(results[1][1], results[0][1])


@BOTH
@pytest.mark.parametrize("explicit", [False, True])
def test_one_infinity_anywhere_skips_the_step(name: str, explicit: bool) -> None:
    dense, x, t = batch("vgg19")
    model = dcx.convert(dense, x)
    optimizer = getattr(dcx.optim, name)(model, **SETTINGS[name])
    before = _parameters(model)
    assert {"features.0.weight", "features.4.bias", "classifier.weight"} <= before.keys()
    for key in ("features.0.weight", "features.4.bias", "classifier.weight"):
        scaler = torch.amp.GradScaler(**SCALER)
        optimizer.zero_grad()
        _backward(model, scaler, [random_sets(model)], x, t)
        model.compact_grads[key].tensor.view(-1)[-1] = float("inf")
        if explicit:
            scaler.unscale_(optimizer)
        assert not scaled_step(scaler, optimizer), key
        scaler.update()
        assert scaler.get_scale() == SCALER["init_scale"] / 2
    _assert_exact_all(_parameters(model), before)
    assert not _state(optimizer)


def test_each_optimizer_unscales_its_own_gradients_once() -> None:
    dense, x, t = batch("vgg19")
    results = []
    for scaled in (False, True):
        model = dcx.convert(dense, x)
        weights = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() == 1]
        first = dcx.optim.SGD(model, params=weights, **SETTINGS["SGD"])
        second = dcx.optim.AdamW(model, params=vectors, **SETTINGS["AdamW"])
        scaler = torch.amp.GradScaler(**SCALER, enabled=scaled)
        _backward(model, scaler, [model.active], x, t)
        scaler.unscale_(first)
        if scaled:
            with pytest.raises(RuntimeError, match="already been called"):
                scaler.unscale_(first)
        assert scaled_step(scaler, first)
        assert scaled_step(scaler, second)
        scaler.update()
        results.append(_parameters(model))
    assert_gradients_close(results[1], results[0])


class _Synchronisations(TorchDispatchMode):
    """Counts reads of a tensor's value by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@BOTH
def test_a_scaled_step_reads_one_number(name: str) -> None:
    """It is the one torch's scaler reads: whether anything was infinite."""
    dense, x, t = batch("vgg19")
    model = dcx.convert(dense, x)
    optimizer = getattr(dcx.optim, name)(model, **SETTINGS[name])
    scaler = torch.amp.GradScaler(**SCALER)
    _backward(model, scaler, [random_sets(model)], x, t)
    with _Synchronisations() as reads:
        scaled_step(scaler, optimizer)
        scaler.update()
    assert reads.count == 1


def test_a_selector_learns_from_steps_that_were_taken() -> None:
    """Nor does it learn the scale, although saliency is measured on the scaled loss."""
    dense, x, t = batch("vgg19")
    results = []
    for scale in (1.0, 2.0**40):
        model = dcx.convert(dense, x)
        selector = dcx.selectors.CUCB(model.groups, density=0.5, tau=1, seed=0)
        optimizer = dcx.optim.SGD(model, **SETTINGS["SGD"])
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1)
        for count in range(5):
            sets, before = [selector.select()], copy.deepcopy(selector.state_dict())
            model.zero_grad()  # saliency too: after a skipped step the sets are the same again
            _backward(model, scaler, sets, x, t, torch.finfo(x.dtype).max if count == 2 else 1.0)
            measured = model.saliency()
            if scaled_step(scaler, optimizer):
                _assert_exact_all(model.saliency(), measured)  # the step did not change it
                selector.update(model.saliency())
            else:
                assert count == 2
                assert str(selector.state_dict()) == str(before)
            scaler.update()
        results.append((_parameters(model), selector.final()))
    assert results[0][1] == results[1][1]
    assert_gradients_close(results[1][0], results[0][0])


@pytest.mark.parametrize("enabled", [False, True])
def test_scaled_step_takes_optimizers_of_torch(enabled: bool) -> None:
    layer = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=enabled)
    for bad in (False, True):
        optimizer.zero_grad()
        loss = layer(torch.ones(1, 2)).sum() * (float("nan") if bad else 1.0)
        scaler.scale(loss).backward()
        assert scaled_step(scaler, optimizer) == (not (bad and enabled))
        scaler.update()
    assert not optimizer._optimizer_step_post_hooks


def test_a_step_without_gradients_is_refused_as_by_torch() -> None:
    dense, x, t = batch("vgg19")
    model = dcx.convert(dense, x)
    optimizer = dcx.optim.SGD(model, lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    _backward(model, scaler, [model.active], x, t)
    optimizer.zero_grad()
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaled_step(scaler, optimizer)
    assert not optimizer._optimizer_step_post_hooks
