"""Evaluation leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.data import Loader
from dcx_kernels.selectors import Random
from dcx_kernels.train.evaluate import evaluate

Make = Callable[..., Any]


def test_evaluate_counts_every_image(dense_model: Make, test_loader: Loader) -> None:
    model = dense_model().eval()
    result = evaluate(model, test_loader)
    images = torch.cat([images for images, _ in test_loader.batches(0)])
    labels = torch.cat([labels for _, labels in test_loader.batches(0)])
    with torch.no_grad():
        logits = model(images)
    assert result.images == 21
    assert result.accuracy == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert result.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)


def test_evaluate_changes_nothing(channel_model: Make, test_loader: Loader) -> None:
    model = channel_model()
    selector = Random(model.groups, 0.4)
    model.train()
    next(iter(model.modules())).train()
    frozen = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    frozen.eval()  # a module the user froze stays frozen
    now, final = selector.select(), selector.final()
    model.set_active(now)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    generator = torch.get_rng_state()
    evaluate(model, test_loader, sets=final)
    assert model.active == now
    assert model.saliency_reduction == "batch"
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_evaluate_uses_the_given_sets(channel_model: Make, test_loader: Loader) -> None:
    model = channel_model()
    one = {name: ChannelSet([0], group.num_channels) for name, group in model.groups.items()}
    narrow = evaluate(model, test_loader, sets={k: v for k, v in one.items() if _open(model, k)})
    full = evaluate(model, test_loader)
    assert narrow.loss != full.loss


def _open(model: Any, name: str) -> bool:
    return bool(model.groups[name].selectable)


def test_evaluate_restores_after_an_error(channel_model: Make, test_loader: Loader) -> None:
    model = channel_model().train()
    before = dict(model.active)

    def broken(logits: object, labels: object) -> torch.Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        evaluate(model, test_loader, sets=Random(model.groups, 0.4).final(), loss_fn=broken)
    assert model.active == before
    assert model.training
    assert model.saliency_reduction == "batch"
