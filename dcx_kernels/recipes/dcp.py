"""Dynamic channel propagation: train, select by utility, cut out without fine-tuning.

References:
    Shen et al., "Learning to Prune in Training via Dynamic Channel Propagation", Algorithm 1,
    section IV. https://arxiv.org/abs/2007.01486
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from dcx_kernels.graph import ChannelGroup, ChannelModel
from dcx_kernels.recipes.config import DCPConfig
from dcx_kernels.recipes.run import Run
from dcx_kernels.recipes.stages import (
    Loaders,
    Stage,
    channel_sgd,
    first_channels,
    measure_if_needed,
    settle,
)
from dcx_kernels.selectors import DCP, Random, Selector, Static
from dcx_kernels.train import rng

__all__ = ["make_selector", "pruned_groups", "train_selected"]

_BLOCK = re.compile(r"layer\d+\.\d+\.")
_OUTSIDE = "outside of the residual blocks"


def train_selected(
    model: ChannelModel, loaders: Loaders, config: DCPConfig, run: Run, arm: str = "sparse"
) -> Stage:
    """Train with the channels of the highest utility at each step (Algorithm 1).

    The model comes with random weights or with trained ones. What is left of the procedure is
    `cut_out`, which copies the surviving weights and running statistics into the thin network.
    """
    rng.seed(config.seed)
    steps = len(loaders.train)
    selector = make_selector(model.groups, config, steps)
    measure_if_needed(model, selector, config)
    optimizer = channel_sgd(model, config)
    trainer = run.trainer(arm, model, selector, optimizer, config.schedule, steps_per_epoch=steps)
    trainer.fit(loaders.train, config.epochs, eval_loader=loaders.test)
    return settle(model, selector, loaders, config, arm)


def make_selector(
    groups: Mapping[str, ChannelGroup], config: DCPConfig, steps_per_epoch: int
) -> Selector:
    """Return the selector that ``config`` names, for the groups that the paper prunes.

    Args:
        groups: all groups of the model.
        config: the settings, in epochs where they are times.
        steps_per_epoch: batches of an epoch.
    """
    initial = config.initial or ("inverse" if _has_blocks(groups) else "zero")
    groups = pruned_groups(groups, config)
    limits = {"min_active": config.min_active, "round_to": config.round_to}
    if config.selector == "random":
        return Random(groups, config.density, **limits, seed=config.seed)
    if config.selector == "static":
        return Static(first_channels(groups, config.density, config.min_active))
    return DCP(
        groups,
        config.density,
        decay=config.decay_steps(steps_per_epoch),
        warmup_steps=config.warmup * steps_per_epoch,
        strict=config.strict,
        decay_scope=config.decay_scope,
        initial=initial,
        **limits,
    )


def pruned_groups(groups: Mapping[str, ChannelGroup], config: DCPConfig) -> dict[str, ChannelGroup]:
    """Return the groups, with those kept full that the paper does not prune (sections IV-B to D).

    VGG: all convolutions. ResNets: the first convolution of each basic block, the first two of each
    bottleneck. With ``residual="keep"`` these are the selectable ones but for the stem of networks
    whose first shortcut has a convolution, as in ResNet-50. Both torchvision's and our ResNets call
    their blocks layer1.0, layer1.1 and so on; other networks are left as they are.
    """
    if not _has_blocks(groups) or config.residual != "keep":
        return dict(groups)
    return {
        name: group
        if _BLOCK.match(name) or not group.selectable
        else dataclasses.replace(group, selectable=False, reason=_OUTSIDE)
        for name, group in groups.items()
    }


def _has_blocks(groups: Mapping[str, ChannelGroup]) -> bool:
    return any(_BLOCK.match(name) for name, group in groups.items() if group.selectable)
