"""Running statistics become the average over the batches, for active channels only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dcx_kernels.graph import compact
from dcx_kernels.selectors import Random
from dcx_kernels.train.recalibrate import recalibrate

Make = Callable[..., Any]


def _reference(model: nn.Module, loader: Any, batches: int | None) -> dict[str, torch.Tensor]:
    """Cumulative averages by torch itself, momentum None, on an ordinary network."""
    model.eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
    with torch.no_grad():
        for index, (images, _) in enumerate(loader.batches(0)):
            if index != batches:
                model(images)
            else:
                break
    return {k: v for k, v in model.state_dict().items() if "running" in k}


@pytest.mark.parametrize("batches", [None, 1, 3])
def test_recalibrate_is_the_cumulative_average(
    dense_model: Make, loader_of: Make, batches: int | None
) -> None:
    loader = loader_of(seed=4)
    wanted = _reference(dense_model(), loader, batches)
    model = dense_model()
    tracked = model.bn1.num_batches_tracked.clone()
    assert recalibrate(model, loader, batches=batches) == 2
    for name, value in wanted.items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.bn1.num_batches_tracked, tracked)
    assert model.bn1.momentum == 0.1
    assert model.training


@pytest.mark.parametrize("execution", ["sparse", "mask"])
def test_recalibrate_touches_active_channels_only(
    channel_model: Make, loader_of: Make, execution: str
) -> None:
    model = channel_model(execution=execution)
    sets = Random(model.groups, 0.5).final()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    recalibrate(model, loader_of(), sets=sets)
    after = model.state_dict()
    changed = [k for k in after if not torch.equal(before[k], after[k])]
    assert changed == [k for k in after if "running" in k]
    norms = {"bn1": "conv1", "bn2": "conv2"}
    for name, channel_set in sets.items():
        norm = next(n for n, conv in norms.items() if conv in name or n in name)
        for entry in ("running_mean", "running_var"):
            moved = before[f"{norm}.{entry}"] != after[f"{norm}.{entry}"]
            assert torch.equal(moved, channel_set.mask())


def test_recalibrate_equals_recalibrating_the_thin_network(
    channel_model: Make, loader_of: Make
) -> None:
    model = channel_model().double()
    model.set_active(Random(model.groups, 0.5).final())
    thin = compact(model)
    loader = loader_of(dtype=torch.float64)
    recalibrate(model, loader)
    wanted = _reference(thin, loader, None)
    got = compact(model).state_dict()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12)


def test_recalibrate_is_deterministic_and_forgets_what_was(
    channel_model: Make, loader_of: Make
) -> None:
    model = channel_model()
    recalibrate(model, loader_of())
    once = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model.get_buffer("bn1.running_mean").fill_(1e6)
    generator = torch.get_rng_state()
    recalibrate(model, loader_of())
    assert all(torch.equal(once[k], v) for k, v in model.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())


def test_recalibrate_weighs_batches_by_their_images(dense_model: Make, loader_of: Make) -> None:
    images = torch.cat([x for x, _ in loader_of(images=20, shuffle=False).batches(0)])
    model = dense_model()
    recalibrate(model, loader_of(images=20, shuffle=False))  # 8, 8 and 4 images
    with torch.no_grad():
        mean = model.conv1(images).mean((0, 2, 3))
    torch.testing.assert_close(model.bn1.running_mean, mean)
