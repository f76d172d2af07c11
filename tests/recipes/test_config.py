"""The defaults are the paper's, and nonsense is refused in a sentence."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from dcx_kernels.data import ImageData
from dcx_kernels.recipes import DCEConfig, DCPConfig
from dcx_kernels.recipes.config import METHODS
from dcx_kernels.recipes.methods import config_of
from dcx_kernels.recipes.stages import make_loaders


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


def test_dcp_defaults_are_those_of_the_papers_code_for_vgg() -> None:
    config = DCPConfig()
    assert (config.epochs, config.batch_size, config.lr) == (200, 64, 0.1)
    assert (config.momentum, config.nesterov, config.weight_decay) == (0.9, False, 1e-4)
    assert (config.saliency, config.recalibrate, config.thin_epochs) == ("sample", False, 0)
    assert (config.warmup, config.moves) == (10, (67, 134))
    assert config.decay_steps(100) == {0: 0.6, 6700: 0.7, 13400: 1.0}
    assert config.selecting == range(10, 200)


def test_dcp_learning_rate_and_lambda_move_together() -> None:
    config = DCPConfig(epochs=200, milestones=(100, 150, 190), decay=0.5)
    factors = [config.schedule(epoch, 200) for epoch in (0, 99, 100, 149, 150, 189, 190, 199)]
    assert factors == [1.0, 1.0, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    assert config.decay_steps(7) == {0: 0.5, 700: 0.6, 1050: 0.7, 1330: 1.0}
    divided = DCPConfig(milestones=(3,), decay=0.6, decay_policy="divide")
    assert divided.decay_steps(10) == {0: 0.6, 30: 0.06}
    assert DCPConfig(decay_policy="constant", decay=0.9).decay_steps(10) == {0: 0.9}


@pytest.mark.parametrize(
    ("epochs", "moves", "warmup"),
    [(1, (1,), 1), (2, (1, 2), 1), (3, (1, 2), 1), (6, (2, 4), 1), (30, (10, 20), 5)],
)
def test_dcp_thirds_and_warm_up_of_short_runs(
    epochs: int, moves: tuple[int, ...], warmup: int
) -> None:
    config = DCPConfig(epochs=epochs)
    assert (config.moves, config.warmup) == (moves, warmup)
    assert DCPConfig(epochs=epochs, warmup_epochs=0).warmup == 0
    assert DCPConfig(epochs=epochs, selector="random").warmup == 0


def test_dcp_milestones_may_be_a_list() -> None:
    assert DCPConfig(milestones=[2, 4]) == DCPConfig(milestones=(2, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selector": "cucb"}, "selector to be one of .*'dcp'.*, got cucb"),
        ({"warmup_epochs": -1}, "warmup_epochs to be a whole number of at least 0, got -1"),
        ({"epochs": 3, "warmup_epochs": 4}, "at most 3 warmup_epochs, got 4"),
        ({"milestones": (0, 5)}, r"milestones that rise from 1 on, got \[0, 5\]"),
        ({"milestones": (5, 5)}, "milestones that rise"),
        ({"decay": 1.5}, "a decay from 0 to 1, got 1.5"),
        ({"decay": float("nan")}, "a decay from 0 to 1"),
        ({"decay_policy": "drop"}, "decay_policy to be one of .*, got drop"),
        ({"decay_scope": "some"}, "decay_scope to be one of"),
        ({"initial": "one"}, "initial to be one of"),
    ],
)
def test_dcp_config_refuses_nonsense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DCPConfig(**change)


@pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 0.0}, r"expected a density in \(0, 1\], got 0.0"),
        ({"density": 1.5}, "density"),
        ({"density": float("nan")}, "density"),
        ({"epochs": 0}, "epochs to be a positive whole number, got 0"),
        ({"batch_size": -4}, "batch_size"),
        ({"lr": 0.0}, "positive learning rate"),
        ({"lr": float("nan")}, "positive learning rate"),
        ({"momentum": -0.1}, r"momentum in \[0, 1\)"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"selector": "best"}, "selector to be one of .*, got best"),
        ({"residual": "some"}, "residual to be one of .*, got some"),
        ({"inactive": "melted"}, "inactive to be one of"),
        ({"saliency": "max"}, "saliency to be one of"),
    ],
)
def test_config_refuses_nonsense(
    kind: type[DCEConfig] | type[DCPConfig], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selector": "dcp"}, "selector to be one of .*'cucb'.*, got dcp"),
        ({"procedure": "three-stage"}, "procedure to be one of"),
        ({"select_epochs": 0}, "select_epochs"),
        ({"epochs": 3, "select_epochs": 4}, "at most 3 select_epochs, got 4"),
        ({"tau": 0}, "tau"),
        ({"finetune_epochs": -1}, "finetune_epochs of at least 0"),
    ],
)
def test_dce_config_refuses_nonsense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DCEConfig(**change)


@pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)
def test_the_identity_of_a_run_gives_its_configuration_back(
    kind: type[DCEConfig] | type[DCPConfig],
) -> None:
    config = kind(density=0.3, seed=4)
    identity = {"model": "vgg16", "method": kind.method, **dataclasses.asdict(config), "arm": "x"}
    assert config_of(identity) == config
    with pytest.raises(KeyError, match="method"):
        config_of(dataclasses.asdict(config))


def test_augmentation_by_name() -> None:
    assert DCEConfig(augment="flip-colour").augment == "flip-colour"
    with pytest.raises(ValueError, match=r"augment to be one of .*, got 'cutout'"):
        DCPConfig(augment="cutout")


@pytest.mark.parametrize(
    ("own", "asked", "used"),
    [
        ("crop-flip", True, "crop-flip"),
        ("crop-flip", False, "none"),
        ("crop-flip", "flip-colour", "flip-colour"),
        ("crop", "flip-colour", "crop"),  # digits are not mirrored
        ("crop-flip", "crop", "crop"),
        ("none", "none", "none"),
    ],
)
def test_loaders_augment_as_asked_but_mirror_no_digits(
    own: str, asked: bool | str, used: str
) -> None:
    images, labels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    data = ImageData.build("x", (images, labels), (images, labels), ["a"], own, None)
    loaders = make_loaders(data, 2, asked, 0, torch.device("cpu"))
    assert (loaders.train.augment, loaders.plain.augment) == (used, "none")
