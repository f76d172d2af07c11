"""The recipes of the targets of feature boosting and suppression, and of what it is compared with.

References:
    Gao et al., "Dynamic Channel Pruning: Feature Boosting and Suppression", section 4,
    appendices A and B. https://arxiv.org/abs/1810.05331
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dcx_kernels.graph import (
    FBSModel,
    convert_fbs,
    cost,
    count_winners,
    cut_unused,
    memory_access,
    watch_winners,
)
from dcx_kernels.recipes.fbs import FBSConfig, FBSPoint, arm_of, train_fbs
from dcx_kernels.recipes.reproduce_times import times
from dcx_kernels.recipes.reproduce_work import Work
from dcx_kernels.recipes.run import Run
from dcx_kernels.recipes.slimming import SlimmingConfig, train_slimming
from dcx_kernels.recipes.stages import Loaders, train_plain

__all__ = ["run_fbs", "run_fbs_memory", "run_slimming"]

_CLOUD = 128  # images at once, in Table 3
_SHOWN = 0.5  # density of Figure 3b
_COUNTED = 4  # batches over which memory accesses are means


def run_slimming(work: Work) -> dict[str, Any]:
    """Network slimming: the density of a line is the share of channels that one threshold leaves.

    The paper starts from the model of the budget before; we start from the ordinary one.
    """
    loaders = _loaders(work)
    config = _slimming(work, 1 - work.entry.density)
    stage = train_slimming(_start(work, loaders), loaders, config, _run(work, "ns", config))[1]
    price = cost(stage.model, work.example())
    widths = {name: len(chosen) for name, chosen in (stage.sets or {}).items()}
    found = {"accuracy": stage.accuracy, "params": price.params, "macs": price.macs}
    return {**found, "widths": widths, **_whole(work)}


def run_fbs(work: Work) -> dict[str, Any]:
    """Feature boosting and suppression, down the densities to that of the line.

    All densities of a table share one chain of trainings. Parameters are those that are left when
    channels that no training image ever chose are cut out. Times are those at this density.
    """
    model, loaders, point, run = _gated(work)
    left = cut_unused(model, count_winners(model, _images(loaders.plain)))
    found = {} if work.entry.density != _SHOWN else {"skipping": _skipping(work, model, loaders)}
    return {
        **found,
        "accuracy": point.accuracy,
        "params": sum(parameter.numel() for parameter in left.parameters()),
        "macs": point.cost.macs + point.cost.gate_macs,
        "gate_macs": point.cost.gate_macs,
        "weight_bytes": point.cost.weight_bytes,
        "activation_bytes": point.cost.activation_bytes,
        "widths": {name: made for name, (_, made) in point.cost.layers.items()},
        "left": {name: layer.out_channels for name, layer in left.gated.items()},
        **_whole(work),
        **times(run, [arm_of(point.density)]),
    }


def run_fbs_memory(work: Work) -> dict[str, Any]:
    """What one image reads, writes and needs at once (Table 3); of the network before, too."""
    before = work.start is None
    if before:
        loaders = _loaders(work)
        model = convert_fbs(work.network(), work.example())
    else:
        model, loaders = _gated(work)[:2]
    one = memory_access(model, _images(loaders.test, _COUNTED), dense=before)
    many = memory_access(model, _images(loaders.test, _COUNTED), batch=_CLOUD, dense=before)
    whole = memory_access(model, _images(loaders.test, 1), dense=True)
    return {
        "weight_bytes": one.weight_bytes,
        "activation_bytes": one.activation_bytes,
        "peak_bytes": one.peak_bytes,
        "peak_128_bytes": many.peak_bytes,
        "macs": one.macs,
        "dense_macs": whole.macs,
    }


class _Gated(NamedTuple):
    model: FBSModel
    loaders: Loaders
    point: FBSPoint
    run: Run


def _gated(work: Work) -> _Gated:
    """Train down to the density of the line; return the network and what it reached there."""
    loaders = _loaders(work)
    dense = _start(work, loaders)
    slim = work.settings.get("slim")
    if slim is not None:
        config = _slimming(work, slim)
        dense = train_slimming(dense, loaders, config, _run(work, "ns", config))[1].model
    epochs = work.settings["epochs"]
    chain = FBSConfig(
        density=work.entry.density,
        warm_epochs=epochs,
        epochs=epochs,
        decay_every=work.settings["decay_every"],
        init=work.settings.get("init", "paper"),
        **_sgd(work),
    )
    identity = {k: v for k, v in asdict(chain).items() if k != "density"}  # one chain for all
    name = "fbs" if slim is None else "ns-fbs"
    run = work.run({**_shared(work), "slim": slim, **identity}, name)
    model, points = train_fbs(dense, loaders, chain, run, last_only=True)
    return _Gated(model, loaders, points[-1], run)


def _loaders(work: Work) -> Loaders:
    return work.loaders(**_batches(work))


def _batches(work: Work) -> dict[str, Any]:
    """Return what these recipes' configurations do not hold."""
    return {
        "batch_size": work.settings["batch_size"],
        "augment": work.settings.get("augment", True),
    }


def _shared(work: Work) -> dict[str, Any]:
    return {**work.shared(), **_batches(work)}


def _start(work: Work, loaders: Loaders) -> nn.Module:
    first = work.baseline()
    run = first.run(first.config_identity(), "dense")
    return train_plain(first.network(), loaders, first.config(), run).model


def _slimming(work: Work, pruned: float) -> SlimmingConfig:
    sparse = work.settings["sparse_epochs"]
    return SlimmingConfig(
        pruned=round(pruned, 6),
        sparse_epochs=sparse,
        finetune_epochs=max(0, work.settings["epochs"] - sparse),
        decay_every=work.settings["decay_every"],
        **_sgd(work),
    )


def _sgd(work: Work) -> dict[str, Any]:
    names = ("lr", "momentum", "weight_decay")
    return {"seed": work.seed, **{name: work.settings[name] for name in names}}


def _run(work: Work, name: str, config: SlimmingConfig) -> Run:
    return work.run({**_shared(work), **asdict(config)}, f"{name}-{1 - config.pruned:g}")


def _whole(work: Work) -> dict[str, Any]:
    price = cost(work.network(), work.example())
    return {"dense_params": price.params, "dense_macs": price.macs}


@torch.no_grad()
def _skipping(work: Work, model: FBSModel, loaders: Loaders) -> dict[str, list[list[float]]]:
    """Return the probability of skipping by layer, class and channel over the test images."""
    classes = work.data.num_classes
    chosen: dict[str, Tensor] = {}
    counts = torch.zeros(classes, dtype=torch.float64)
    model.eval()
    with watch_winners(model) as seen:
        for images, labels in loaders.test.batches(0):
            model(images)
            which = nn.functional.one_hot(labels, classes).double().cpu()
            counts += which.sum(0)
            for name, watched in seen.items():
                found = which.T @ watched.chosen.double().cpu()  # [classes, channels]
                chosen[name] = chosen.get(name, torch.zeros_like(found)) + found
    share = {name: found / counts.clamp(min=1)[:, None] for name, found in chosen.items()}
    return {name: (1 - part).mul(1e4).round().div(1e4).tolist() for name, part in share.items()}


def _images(loader: Any, batches: int | None = None) -> Iterator[Tensor]:
    for images, _ in islice(loader.batches(0), batches):
        yield images
