"""Parameters, gradients and states that lie in memory in different ways."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dcx_kernels as dcx
from networks import batch, random_sets
from tolerances import assert_exact, assert_gradients_close

SETTINGS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2},
    # a bias before a norm has a true gradient of 0: a small eps would blow up its rounding
    "AdamW": {"lr": 0.1, "eps": 1e-4},
}
BOTH = pytest.mark.parametrize("name", list(SETTINGS))


def _ours(name: str, model: nn.Module) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = getattr(dcx.optim, name)(model, **SETTINGS[name])
    return optimizer


def _torchs(name: str, model: nn.Module) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(
        model.parameters(), **SETTINGS[name]
    )
    return optimizer


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, t: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), t).backward()
    optimizer.step()


class _Holder(nn.Module):
    """One parameter, with the strides of the tensor it is given."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


@BOTH
@pytest.mark.parametrize("which", ["gradient", "parameter", "state"])
def test_strides_do_not_matter(name: str, which: str) -> None:
    """The fused kernels of torch go through memory: tensors must lie alike first."""
    values = torch.randn(4, 6, dtype=torch.float64)
    models = []
    for _ in range(2):
        weight = values.clone()
        models.append(_Holder(weight[:, ::2] if which == "parameter" else weight))
    optimizers = [_ours(name, models[0]), _torchs(name, models[1])]
    for count in range(3):
        grad = torch.randn(models[0].weight.shape[::-1], dtype=torch.float64).t()
        for model, optimizer in zip(models, optimizers, strict=True):
            model.weight.grad = grad.clone() if which == "gradient" else grad.contiguous()
            assert model.weight.grad.is_contiguous() == (which != "gradient")
            optimizer.step()
            if which == "state" and count == 0:
                _transpose_in_memory(optimizer.state[model.weight])
    assert_gradients_close(models[0].state_dict(), models[1].state_dict())


def _transpose_in_memory(state: dict[str, Any]) -> None:
    for key, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.dim() == 2:
            state[key] = tensor.t().contiguous().t()


@BOTH
def test_state_of_a_channels_last_network_is_taken_over(name: str) -> None:
    """A dense run in channels_last goes on sparse: its state has other strides than our weights."""
    dense, x, t = batch("chain")
    dense.to(memory_format=torch.channels_last)
    torchs = _torchs(name, dense)
    _step(dense, torchs, x, t)
    strided = copy.deepcopy(torchs.state_dict())
    contiguous = copy.deepcopy(strided)
    for entry in contiguous["state"].values():
        entry.update((k, v.contiguous()) for k, v in entry.items() if isinstance(v, Tensor))
    runs = []
    for state in (strided, contiguous):
        model = dcx.convert(dense, x)
        optimizer = _ours(name, model)
        optimizer.load_state_dict(state)
        runs.append((model, optimizer))
    _step(dense, torchs, x, t)
    sets = random_sets(runs[0][0])
    for model, optimizer in runs:
        _step(model, optimizer, x, t)
        assert_gradients_close(model.state_dict(), dense.state_dict())
        model.set_active(sets)
        _step(model, optimizer, x, t)
    for key, tensor in runs[1][0].state_dict().items():
        assert_exact(runs[0][0].state_dict()[key], tensor, key)


def test_sparse_gradients_of_embeddings_work() -> None:
    ours = nn.Embedding(5, 3, sparse=True, dtype=torch.float64)
    torchs = copy.deepcopy(ours)
    optimizers = dcx.optim.SGD(ours, lr=0.1), torch.optim.SGD(torchs.parameters(), lr=0.1)
    for model, optimizer in zip((ours, torchs), optimizers, strict=True):
        model(torch.tensor([1, 2, 2])).square().sum().backward()
        optimizer.step()
    assert_gradients_close(ours.state_dict(), torchs.state_dict())
