"""The defaults are the paper's, and nonsense is refused in a sentence."""

from __future__ import annotations

from typing import Any

import pytest

from dcx_kernels.recipes import DCEConfig


def test_defaults_are_the_papers() -> None:
    config = DCEConfig()
    assert (config.epochs, config.batch_size, config.lr) == (160, 64, 0.1)
    assert (config.momentum, config.weight_decay, config.tau) == (0.9, 1e-4, None)
    assert (config.procedure, config.selector, config.inactive) == ("two-stage", "cucb", "frozen")


def test_two_stage_selects_throughout_and_repeats_the_training() -> None:
    config = DCEConfig(epochs=8)
    assert (config.selection_epochs, config.thin_epochs) == (8, 8)
    assert DCEConfig(epochs=8, finetune_epochs=3).thin_epochs == 3
    assert DCEConfig(epochs=8, finetune_epochs=0).thin_epochs == 0


def test_single_stage_freezes_after_a_quarter_as_40_of_160() -> None:
    config = DCEConfig(procedure="single-stage")
    assert (config.selection_epochs, config.thin_epochs) == (40, 0)
    assert DCEConfig(procedure="single-stage", finetune_epochs=9).thin_epochs == 9
    assert DCEConfig(procedure="single-stage", select_epochs=7).selection_epochs == 7
    assert DCEConfig(procedure="single-stage", epochs=2).selection_epochs == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 0.0}, r"expected a density in \(0, 1\], got 0.0"),
        ({"density": 1.5}, "density"),
        ({"density": float("nan")}, "density"),
        ({"epochs": 0}, "epochs to be a positive whole number, got 0"),
        ({"batch_size": -4}, "batch_size"),
        ({"select_epochs": 0}, "select_epochs"),
        ({"epochs": 3, "select_epochs": 4}, "at most 3 select_epochs, got 4"),
        ({"tau": 0}, "tau"),
        ({"finetune_epochs": -1}, "finetune_epochs of at least 0"),
        ({"lr": 0.0}, "positive learning rate"),
        ({"lr": float("nan")}, "positive learning rate"),
        ({"momentum": -0.1}, r"momentum in \[0, 1\)"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"selector": "best"}, "selector to be one of .*, got best"),
        ({"procedure": "three-stage"}, "procedure to be one of"),
        ({"residual": "some"}, "residual to be one of .*, got some"),
        ({"inactive": "melted"}, "inactive to be one of"),
        ({"saliency": "max"}, "saliency to be one of"),
    ],
)
def test_config_refuses_nonsense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DCEConfig(**change)
