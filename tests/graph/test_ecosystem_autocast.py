"""Autocast: a converted network computes in bfloat16 where the dense one does, and as well."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dcx_kernels as dcx
from networks import batch, random_sets
from tolerances import assert_close_to_float64

BF16 = {"device_type": "cpu", "dtype": torch.bfloat16}


def _dtypes(model: nn.Module, x: Tensor) -> dict[str, torch.dtype]:
    """Run once, and return the dtype of every convolution's, norm's and linear layer's output."""
    found = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, __: Any, y: Tensor) -> None:
            found[name] = y.dtype

        return hook

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            layer.register_forward_hook(note(name))
    found["output"] = model(x).dtype
    return found


@pytest.mark.parametrize("execution", ["sparse", "mask"])
@pytest.mark.parametrize("enabled", [False, True])
def test_layers_return_the_dtypes_of_the_dense_network(execution: str, enabled: bool) -> None:
    dense, x, _ = batch("vgg19")
    dense, x = dense.float(), x.float()
    model = dcx.convert(dense, x, execution=execution)
    with torch.autocast(**BF16, enabled=enabled):
        expected = _dtypes(dense, x)
        assert _dtypes(model, x) == expected
        model.set_active(random_sets(model))
        assert _dtypes(model, x) == expected
    assert expected["output"] == (torch.bfloat16 if enabled else torch.float32)


@pytest.mark.parametrize("grads", ["compact", "dense"])
def test_a_step_is_as_good_as_the_masked_one(grads: str) -> None:
    """Logits and loss after a forward, float32 weights after a step: as torch's, in bfloat16."""
    network, x, t = batch("vgg19")
    network = network.float()
    sparse = dcx.convert(network, x.float())
    masked = dcx.convert(network, x.float(), execution="mask")
    truth = dcx.convert(copy.deepcopy(network).double(), x, execution="mask")
    sparse.grads = grads
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}
    runs = (
        (sparse, dcx.optim.SGD(sparse, inactive="decay", **settings)),
        (masked, torch.optim.SGD(masked.parameters(), **settings)),
        (truth, torch.optim.SGD(truth.parameters(), **settings)),
    )
    sets = random_sets(sparse)
    results = []
    for model, optimizer in runs:
        model.set_active(sets)
        exact = model is truth
        with torch.autocast(**BF16, enabled=not exact):
            y = model(x if exact else x.float())
            loss = F.cross_entropy(y, t)
        loss.backward()
        packed = model is sparse and grads == "compact"
        assert all((p.grad is None) == packed for p in model.parameters())
        optimizer.step()
        results.append({"logits": y, "loss": loss, **dict(model.named_parameters())})
    for key, value in results[0].items():
        assert_close_to_float64(value, results[1][key], results[2][key], key)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_compact_gradients_and_state_stay_in_float32(name: str) -> None:
    network, x, t = batch("vgg19")
    network, x = network.float(), x.float()
    model = dcx.convert(network, x)
    optimizer = getattr(dcx.optim, name)(model, lr=0.01)
    for _ in range(2):
        model.set_active(random_sets(model))
        optimizer.zero_grad()
        with torch.autocast(**BF16):
            loss = F.cross_entropy(model(x), t)
        loss.backward()
        assert {g.tensor.dtype for g in model.compact_grads.values()} == {torch.float32}
        assert {s.dtype for s in model.saliency().values()} == {torch.float32}
        optimizer.step()
    state = [v for entry in optimizer.state.values() for v in entry.values()]
    assert {v.dtype for v in (*model.parameters(), *state)} == {torch.float32}
    with torch.no_grad():
        evaluated = model.eval()(x)
        with torch.autocast(**BF16):
            assert model(x).dtype == torch.bfloat16
    assert evaluated.dtype == torch.float32
