"""Dynamic channel execution: the two procedures of the paper, over the training loop.

References:
    Spasov and Lio, "Dynamic Neural Network Channel Execution for Efficient Training",
    Algorithm 1, sections 3.3 and 3.4. https://arxiv.org/abs/1905.06435
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.data import Loader
from dcx_kernels.graph import ChannelGroup, ChannelModel, compact
from dcx_kernels.optim import SGD
from dcx_kernels.recipes.config import DCEConfig
from dcx_kernels.recipes.run import Run
from dcx_kernels.selectors import CUCB, Random, Selector, Static
from dcx_kernels.train import rng
from dcx_kernels.train.evaluate import evaluate
from dcx_kernels.train.recalibrate import recalibrate

__all__ = [
    "Loaders",
    "Stage",
    "finetune",
    "first_channels",
    "make_selector",
    "train_plain",
    "train_selected",
]


@dataclass(frozen=True)
class Loaders:
    """The batches of a run.

    Args:
        train: shuffled and augmented.
        plain: training images as they are, for batch-norm statistics.
        test: evaluated after each epoch.
    """

    train: Loader
    plain: Loader
    test: Loader


@dataclass(frozen=True)
class Stage:
    """A trained network.

    Args:
        arm: its name.
        model: the network; a `ChannelModel` has its final channels active.
        sets: the final channels, if any were chosen.
        accuracy: on the test images.
        accuracy_as_trained: the same with the running statistics of training; None if these were
            not replaced.
    """

    arm: str
    model: nn.Module
    sets: Mapping[str, ChannelSet] | None
    accuracy: float
    accuracy_as_trained: float | None = None


def train_selected(
    model: ChannelModel, loaders: Loaders, config: DCEConfig, run: Run, arm: str = "sparse"
) -> Stage:
    """Train with a new selection at each step, then settle on the final one (Algorithm 1, 1-13).

    In the single-stage procedure the topology freezes after ``config.selection_epochs``, and
    training goes on with the momentum, weights and learning rate it has. It goes on sparsely: the
    thin network with `dcx_kernels.compact_optimizer` would take the same steps, but then the
    checkpoints of this stage would be of two architectures.
    """
    rng.seed(config.seed)
    selector = make_selector(model.groups, config)
    if run.saved_selector(arm) == "Static":  # stopped after freezing: the sets are in the file
        selector = Static({name: ChannelSet.full(n) for name, n in selector.groups.items()})
    trainer = run.trainer(arm, model, selector, _channel_sgd(model, config))
    _measure_if_needed(model, selector, config)
    trainer.fit(
        loaders.train, config.epochs, eval_loader=loaders.test, until=config.selection_epochs
    )
    if trainer.position.epoch < config.epochs:
        if not isinstance(selector, Static):
            selector = trainer.selector = Static(selector.final())
        _measure_if_needed(model, selector, config)
        trainer.fit(loaders.train, config.epochs, eval_loader=loaders.test)
    sets = selector.final()
    model.set_active(sets)
    accuracy = evaluate(model, loaders.test).accuracy
    if not config.recalibrate:
        return Stage(arm, model, sets, accuracy)
    recalibrate(model, loaders.plain, batches=config.recalibrate_batches)
    return Stage(arm, model, sets, evaluate(model, loaders.test).accuracy, accuracy)


def finetune(
    selected: Stage, loaders: Loaders, config: DCEConfig, run: Run, arm: str = "thin"
) -> Stage:
    """Cut the selection out as a plain network and repeat the training (Algorithm 1, line 14).

    The optimizer is fresh and the learning rate starts again. In the single-stage procedure the
    network is trained already and only cut out.
    """
    if not isinstance(selected.model, ChannelModel) or selected.sets is None:
        raise ValueError("expected a stage with selected channels to fine-tune")
    model = compact(selected.model)
    if loaders.train.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.thin_epochs == 0:
        accuracy = evaluate(model, loaders.test).accuracy
        return Stage(arm, model, selected.sets, accuracy)
    rng.seed(config.seed)
    sets = {name: s.indices.tolist() for name, s in selected.sets.items()}
    trainer = run.trainer(arm, model, None, _plain_sgd(model, config), sets=sets)
    trainer.fit(loaders.train, config.thin_epochs, eval_loader=loaders.test)
    return Stage(arm, model, selected.sets, evaluate(model, loaders.test).accuracy)


def train_plain(
    model: nn.Module, loaders: Loaders, config: DCEConfig, run: Run, arm: str = "dense"
) -> Stage:
    """Train an ordinary network with the same recipe: the baseline."""
    rng.seed(config.seed)
    trainer = run.trainer(arm, model, None, _plain_sgd(model, config))
    trainer.fit(loaders.train, config.epochs, eval_loader=loaders.test)
    return Stage(arm, model, None, evaluate(model, loaders.test).accuracy)


def make_selector(groups: Mapping[str, ChannelGroup], config: DCEConfig) -> Selector:
    """Return the selector that ``config`` names, for the selectable groups."""
    limits = {"min_active": config.min_active, "round_to": config.round_to, "seed": config.seed}
    if config.selector == "cucb":
        return CUCB(groups, config.density, tau=config.tau, **limits)
    if config.selector == "random":
        return Random(groups, config.density, **limits)
    return Static(first_channels(groups, config.density, config.min_active))


def first_channels(
    groups: Mapping[str, ChannelGroup], density: float, min_active: int = 1
) -> dict[str, ChannelSet]:
    """Return the same share of the first channels of every selectable group, and of its runs."""
    sets = {}
    for name, group in groups.items():
        if group.selectable:
            run = group.num_channels // group.runs
            least = min(-(-min_active // group.runs), run)
            kept = max(least, int(density * run + 1e-9))
            chosen = torch.arange(group.num_channels).view(group.runs, run)[:, :kept].flatten()
            sets[name] = ChannelSet.trusted(chosen, group.num_channels)
    return sets


def _measure_if_needed(model: ChannelModel, selector: Selector, config: DCEConfig) -> None:
    model.saliency_reduction = config.saliency if selector.needs_saliency else None


def _channel_sgd(model: ChannelModel, config: DCEConfig) -> Optimizer:
    return SGD(
        model,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
        inactive=config.inactive,
    )


def _plain_sgd(model: nn.Module, config: DCEConfig) -> Optimizer:
    return torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
        fused=True,
    )
