"""Which paper's procedure a configuration means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dcx_kernels.graph import ChannelGroup, ChannelModel
from dcx_kernels.recipes import dce, dcp
from dcx_kernels.recipes.config import METHODS, DCEConfig, DCPConfig
from dcx_kernels.recipes.run import Run
from dcx_kernels.recipes.stages import Loaders, Stage
from dcx_kernels.selectors import Selector

__all__ = ["Config", "config_of", "make_selector", "train_selected"]

Config = DCEConfig | DCPConfig


def train_selected(
    model: ChannelModel, loaders: Loaders, config: Config, run: Run, arm: str = "sparse"
) -> Stage:
    """Train with selected channels, as the paper that ``config`` is of does."""
    if isinstance(config, DCPConfig):
        return dcp.train_selected(model, loaders, config, run, arm)
    return dce.train_selected(model, loaders, config, run, arm)


def make_selector(
    groups: Mapping[str, ChannelGroup], config: Config, steps_per_epoch: int
) -> Selector:
    """Return the selector of a run, as it is before the first step."""
    if isinstance(config, DCPConfig):
        return dcp.make_selector(groups, config, steps_per_epoch)
    return dce.make_selector(groups, config)


def config_of(identity: Mapping[str, Any]) -> Config:
    """Return the configuration that a checkpoint's identity holds.

    Raises:
        KeyError: if it names no method that is known.
        ValueError: if a setting is out of range.
    """
    kind = METHODS[identity["method"]]
    names = kind.names()
    return kind(**{name: value for name, value in identity.items() if name in names})
