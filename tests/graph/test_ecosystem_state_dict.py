"""state_dicts move between the dense, the converted and the reverted network, strictly."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dcx_kernels as dcx
from networks import batch, random_sets
from tolerances import assert_exact, assert_gradients_close

SGD = {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-3}
FORMS = ("dense", "sparse", "mask", "reverted")


def _trained(execution: str = "sparse") -> tuple[nn.Module, dcx.ChannelModel, Tensor, Tensor]:
    dense, x, t = batch("vgg19")
    model = dcx.convert(dense, x, execution=execution)
    optimizer = dcx.optim.SGD(model, **SGD)
    torch.manual_seed(1)  # the same sets, whatever the conversion drew
    for _ in range(2):
        model.set_active(random_sets(model))
        optimizer.zero_grad()
        F.cross_entropy(model(x), t).backward()
        optimizer.step()
    optimizer.zero_grad()
    model.set_active({n: dcx.ChannelSet.full(s.num_channels) for n, s in model.active.items()})
    return dense, model, x, t


def _as(form: str, model: nn.Module, x: Tensor) -> nn.Module:
    """Return a network of that form with other values than ``model``'s."""
    other: nn.Module = copy.deepcopy(model)
    for tensor in other.state_dict().values():
        tensor.add_(1)
    if form == "dense":
        return other
    converted = dcx.convert(other, x, execution="mask" if form == "mask" else "sparse")
    return dcx.revert(converted) if form == "reverted" else converted


@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("source", FORMS)
def test_every_form_loads_every_other(source: str, target: str) -> None:
    dense, trained, x, _ = _trained("mask" if source == "mask" else "sparse")
    saved: nn.Module = trained
    if source == "dense":
        saved = copy.deepcopy(dense)
        saved.load_state_dict(trained.state_dict(), strict=True)
    elif source == "reverted":
        saved = dcx.revert(trained)
    state = saved.state_dict()
    loading = _as(target, dense, x)
    loading.load_state_dict(state, strict=True)
    loaded = loading.state_dict()
    assert list(loaded) == list(state) == list(dense.state_dict())
    for key, tensor in state.items():
        assert_exact(loaded[key], tensor, key)
    with torch.no_grad():
        y = loading.eval()(x)
        assert_gradients_close({"logits": y}, {"logits": trained.eval()(x)})


@pytest.mark.parametrize("when", ["before forward", "before step"])
def test_a_load_in_the_middle_of_a_step_counts(when: str) -> None:
    """Packed copies of the old weights are neither used again nor written over the loaded ones."""
    results = []
    for execution in ("sparse", "mask"):
        torch.manual_seed(0)
        _, model, x, t = _trained(execution)
        state = {key: value * 1.5 for key, value in model.state_dict().items()}
        optimizer = dcx.optim.SGD(model, lr=0.1)
        model.set_active(random_sets(model))
        if when == "before forward":
            model(x)
            model.load_state_dict(state, strict=True)
        F.cross_entropy(model(x), t).backward()
        if when == "before step":
            model.load_state_dict(state, strict=True)
        optimizer.step()
        results.append(dict(model.named_parameters()))
    assert_gradients_close(results[0], results[1])


def test_loading_with_assign_replaces_parameters() -> None:
    dense, model, x, t = _trained()
    state = {key: tensor.clone() for key, tensor in dense.state_dict().items()}
    model.load_state_dict(state, strict=True, assign=True)
    assert (
        model.get_parameter("classifier.weight").data_ptr() == state["classifier.weight"].data_ptr()
    )
    optimizer = dcx.optim.SGD(model, lr=0.1)
    twin = torch.optim.SGD(dense.parameters(), lr=0.1)
    for network, its_optimizer in ((model, optimizer), (dense, twin)):
        F.cross_entropy(network(x), t).backward()
        its_optimizer.step()
    assert_gradients_close(model.state_dict(), dense.state_dict())


@pytest.mark.parametrize("form", ["sparse", "mask"])
def test_strictness_is_torchs(form: str) -> None:
    dense, _, x, _ = _trained()
    model = _as(form, dense, x)
    state = dense.state_dict()
    state["more"] = state.pop("classifier.bias")
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*classifier.bias.*Unexpected.*more"):
        model.load_state_dict(state)
    keys = model.load_state_dict(state, strict=False)
    assert keys == (["classifier.bias"], ["more"])
