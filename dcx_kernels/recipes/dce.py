"""Dynamic channel execution: the two procedures of the paper, over the training loop.

References:
    Spasov and Lio, "Dynamic Neural Network Channel Execution for Efficient Training",
    Algorithm 1, sections 3.3 and 3.4. https://arxiv.org/abs/1905.06435
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.graph import ChannelGroup, ChannelModel
from dcx_kernels.recipes.config import DCEConfig
from dcx_kernels.recipes.run import Run
from dcx_kernels.recipes.stages import (
    Loaders,
    Stage,
    channel_sgd,
    first_channels,
    measure_if_needed,
    settle,
)
from dcx_kernels.selectors import CUCB, Random, Selector, Static
from dcx_kernels.train import rng

__all__ = ["make_selector", "train_selected"]


def train_selected(
    model: ChannelModel, loaders: Loaders, config: DCEConfig, run: Run, arm: str = "sparse"
) -> Stage:
    """Train with a new selection at each step, then settle on the final one (Algorithm 1, 1-13).

    In the single-stage procedure the topology freezes after ``config.selection_epochs``, and
    training goes on with the momentum, weights and learning rate it has. It goes on sparsely: the
    thin network with `dcx_kernels.compact_optimizer` would take the same steps, but then the
    checkpoints of this stage would be of two architectures.

    What is left of the paper's procedure, line 14, is `cut_out`: the thin network and its training.
    """
    rng.seed(config.seed)
    selector = make_selector(model.groups, config)
    if run.saved_selector(arm) == "Static":  # stopped after freezing: the sets are in the file
        selector = Static({name: ChannelSet.full(n) for name, n in selector.groups.items()})
    trainer = run.trainer(arm, model, selector, channel_sgd(model, config), config.schedule)
    measure_if_needed(model, selector, config)
    trainer.fit(
        loaders.train, config.epochs, eval_loader=loaders.test, until=config.selection_epochs
    )
    # lines 12 and 13; what is frozen already has been through this
    last = selector if isinstance(selector, Static) else _last(model.groups, selector, config)
    if trainer.position.epoch < config.epochs:
        if not isinstance(selector, Static):
            last = selector = trainer.selector = Static(last.final())
        measure_if_needed(model, selector, config)
        trainer.fit(loaders.train, config.epochs, eval_loader=loaders.test)
    return settle(model, last, loaders, config, arm)


def _last(groups: Mapping[str, ChannelGroup], selector: Selector, config: DCEConfig) -> Selector:
    """Return who chooses the final channels: the selector, or for the baseline a draw."""
    if config.final == "best":
        return selector
    return make_selector(groups, replace(config, selector="random"))


def make_selector(groups: Mapping[str, ChannelGroup], config: DCEConfig) -> Selector:
    """Return the selector that ``config`` names, for the selectable groups."""
    limits = {"min_active": config.min_active, "round_to": config.round_to, "seed": config.seed}
    if config.selector == "cucb":
        return CUCB(groups, config.density, tau=config.tau, **limits)
    if config.selector == "random":
        return Random(groups, config.density, **limits)
    return Static(first_channels(groups, config.density, config.min_active))
