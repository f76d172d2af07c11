"""The recipes of the targets: each trains what one line of a table is about, and measures it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dcx_kernels.graph import ChannelModel, convert, cost
from dcx_kernels.recipes import dce, dcp
from dcx_kernels.recipes.config import DCEConfig, DCPConfig
from dcx_kernels.recipes.reproduce_gating import run_fbs, run_fbs_memory, run_slimming
from dcx_kernels.recipes.reproduce_times import times
from dcx_kernels.recipes.reproduce_work import Work
from dcx_kernels.recipes.run import Run
from dcx_kernels.recipes.stages import Stage, cut_out, train_plain

__all__ = ["RECIPES", "Measured"]

Measured = dict[str, Any]
"""accuracy (fraction), params, macs, those of the whole network, widths, and what else there is."""


def _train_dense(work: Work) -> tuple[Stage, Run]:
    """Train the ordinary network, or take it as it is if that is done."""
    config = work.config()
    run = work.run(work.config_identity(), "dense")
    loaders = work.loaders(config.batch_size, config.augment)
    return train_plain(work.network(), loaders, config, run), run


def _run_dense(work: Work) -> Measured:
    """The baseline of a table: all channels, no selection."""
    stage, run = _train_dense(work)
    return {"accuracy": stage.accuracy, **_whole(work, thin=True), **times(run, ["dense"])}


def _run_dce(work: Work) -> Measured:
    """Dynamic channel execution: select, cut out, train the thin network again (Algorithm 1).

    With ``final`` "random" the channels of the thin network are drawn (section 3.4); the training
    before is the same, and done once.
    """
    config = work.config()
    assert isinstance(config, DCEConfig)
    run = work.run(work.config_identity(), f"dce-{config.procedure}-{config.density:g}")
    loaders = work.loaders(config.batch_size, config.augment)
    model = _converted(work, work.network())
    selected = dce.train_selected(model, loaders, config, run, model.execution)
    arm = "thin" if config.final == "best" else "thin-random"
    thin = cut_out(selected, loaders, config, run, arm)
    spent = times(run, [model.execution, arm])
    return {**_selected(work, selected), "accuracy": thin.accuracy, **spent}


def _run_dcp(work: Work) -> Measured:
    """Dynamic channel propagation, from random weights or a trained network; no fine-tuning."""
    config = work.config()
    assert isinstance(config, DCPConfig)
    run = work.run(work.config_identity(), f"dcp-{config.density:g}")
    loaders = work.loaders(config.batch_size, config.augment)
    dense: nn.Module = work.network()
    if work.start is not None:
        dense = _train_dense(work.baseline())[0].model
    model = _converted(work, dense)
    selected = dcp.train_selected(model, loaders, config, run, model.execution)
    thin = cut_out(selected, loaders, config, run)
    spent = times(run, [model.execution])
    return {**_selected(work, selected), "accuracy": thin.accuracy, **spent}


def _converted(work: Work, network: nn.Module) -> ChannelModel:
    """Return the network as the settings want it: ``execution`` "mask" is the papers' way."""
    config, execution = work.config(), work.settings.get("execution", "sparse")
    return convert(network, work.example(), config.residual, execution, saliency=config.saliency)


def _selected(work: Work, stage: Stage) -> Measured:
    """Return size and widths of a network with its final channels; a mask computes them all."""
    assert isinstance(stage.model, ChannelModel)
    price = cost(stage.model)
    sets = stage.sets or {}
    return {
        "params": price.params,
        "macs": price.macs,
        "widths": {name: len(chosen) for name, chosen in sets.items()},
        "channels": {name: chosen.num_channels for name, chosen in sets.items()},
        **_whole(work, thin=stage.model.execution == "mask"),
    }


def _whole(work: Work, thin: bool = False) -> Measured:
    """Return the size of the ordinary network; as that of the thin one too, if it is the same."""
    price = cost(work.network(), work.example())
    found = {"dense_params": price.params, "dense_macs": price.macs}
    return {**found, "params": price.params, "macs": price.macs} if thin else found


RECIPES: dict[str, Callable[[Work], Measured]] = {
    "dense": _run_dense,
    "dce": _run_dce,
    "dcp": _run_dcp,
    "fbs": run_fbs,
    "fbs-memory": run_fbs_memory,
    "ns": run_slimming,
}
