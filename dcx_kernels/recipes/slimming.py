"""Network slimming: an L1 norm on the factors of batch norms, one threshold, fine-tuning.

The comparator of feature boosting and suppression, and what it may start from (NS+FBS: give the
slim network to `train_fbs`).

References:
    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017.
    https://arxiv.org/abs/1708.06519
    Gao et al., "Dynamic Channel Pruning: Feature Boosting and Suppression", appendix A.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.errors import expected
from dcx_kernels.graph import ChannelModel, compact, convert
from dcx_kernels.recipes.fbs import divided_every
from dcx_kernels.recipes.run import Run
from dcx_kernels.recipes.stages import Loaders, Stage
from dcx_kernels.train import rng
from dcx_kernels.train.evaluate import evaluate

__all__ = ["SlimmingConfig", "slim", "slim_sets", "train_slimming"]


@dataclass(frozen=True)
class SlimmingConfig:
    """Everything that determines a run beside model and data.

    Args:
        pruned: share of all selectable channels below the threshold.
        l1: factor on the sum of |gamma| in the loss.
        sparse_epochs: epochs with it.
        finetune_epochs: epochs of the slim network, without it.
        decay_every: epochs after which the learning rate is divided by 10, in both parts.
        lr, momentum, weight_decay: of plain SGD.
        min_active: least channels of a group.
        seed: of data order and augmentation.

    Raises:
        ValueError: if one is out of its range.
    """

    pruned: float = 0.2
    l1: float = 1e-5
    sparse_epochs: int = 150
    finetune_epochs: int = 150
    decay_every: int = 100
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    min_active: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.pruned < 1:
            raise ValueError(expected("pruned in [0, 1)", self.pruned))
        for name in ("sparse_epochs", "decay_every", "min_active"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(expected(f"{name} to be a positive whole number", repr(value)))
        for name in ("l1", "weight_decay", "finetune_epochs"):
            if not getattr(self, name) >= 0:
                raise ValueError(expected(f"{name} of at least 0", getattr(self, name)))
        if not self.lr > 0:
            raise ValueError(expected("a positive learning rate", self.lr))
        if not 0 <= self.momentum < 1:
            raise ValueError(expected("a momentum in [0, 1)", self.momentum))


def train_slimming(
    dense: nn.Module, loaders: Loaders, config: SlimmingConfig, run: Run
) -> tuple[Stage, Stage]:
    """Train with the L1 norm, prune by a global threshold, fine-tune.

    Args:
        dense: the network, trained or not; it is trained in place.
        loaders: of the data.
        config: the recipe.
        run: where log and checkpoints are.

    Returns:
        The network with small factors, and the slim one (arms ``ns-sparse`` and ``ns``).
    """
    _train(dense, "ns-sparse", config.sparse_epochs, config.l1, loaders, config, run)
    sparse = Stage("ns-sparse", dense, None, evaluate(dense, loaders.test).accuracy)
    images, _ = next(iter(loaders.test.batches(0)))
    thin, sets = slim(dense, images[:1], config.pruned, config.min_active)
    if config.finetune_epochs:
        _train(thin, "ns", config.finetune_epochs, 0.0, loaders, config, run)
    return sparse, Stage("ns", thin, sets, evaluate(thin, loaders.test).accuracy)


def slim(
    dense: nn.Module, example_inputs: Tensor, pruned: float, min_active: int = 1
) -> tuple[nn.Module, dict[str, ChannelSet]]:
    """Cut the channels with the smallest |gamma| out of a network, as a plain network.

    Channels that an add joins stay, as do those behind no batch norm.

    Args:
        dense: a trained CNN; it is copied.
        example_inputs: its shape is read.
        pruned: share of all selectable channels that goes.
        min_active: least channels of a group.

    Returns:
        The slim network, and the channels it has.
    """
    model = convert(dense, example_inputs)
    sets = slim_sets(model, pruned, min_active)
    model.set_active(sets)
    return compact(model), sets


def slim_sets(model: ChannelModel, pruned: float, min_active: int = 1) -> dict[str, ChannelSet]:
    """Return the channels above one threshold for the whole network; of equals the first go."""
    factors = _factors(model)
    if not factors:
        raise ValueError(expected("groups of channels behind batch norms", "none", "slimming"))
    count = sum(len(gammas) for gammas in factors.values())
    order = torch.sort(torch.cat(list(factors.values())), stable=True).indices
    kept = torch.ones(count, dtype=torch.bool)
    kept[order[: int(pruned * count + 1e-9)]] = False
    sets, start = {}, 0
    for name, gammas in factors.items():
        mask = kept[start : start + len(gammas)].clone()
        start += len(gammas)
        mask[torch.topk(gammas, min(min_active, len(gammas))).indices] = True
        sets[name] = ChannelSet.from_mask(mask)
    return sets


def _factors(model: ChannelModel) -> dict[str, Tensor]:
    """Return |gamma| of every selectable group; of several norms the greatest."""
    found: dict[str, Tensor] = {}
    for name, group in model.groups.items():
        norms = group.of_role("norm") if group.selectable else []
        for member in norms:
            norm: Any = model.get_submodule(member.module)
            if norm.weight is None or len(member.positions) != group.num_channels:
                continue
            gammas = norm.weight.detach().abs().cpu()[list(member.positions)]
            found[name] = torch.maximum(found.get(name, gammas), gammas)
    return found


def _train(
    model: nn.Module,
    arm: str,
    epochs: int,
    l1: float,
    loaders: Loaders,
    config: SlimmingConfig,
    run: Run,
) -> None:
    rng.seed(config.seed)
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
    )
    schedule = divided_every(config.decay_every)
    trainer = run.trainer(arm, model, None, optimizer, schedule=schedule)
    if l1:
        trainer.loss_fn = _with_l1(model, l1)
    trainer.fit(loaders.train, epochs, eval_loader=loaders.test)


def _with_l1(model: nn.Module, factor: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss: while training, cross entropy and the L1 norm of all factors."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.affine]

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        task = F.cross_entropy(logits, labels)
        if not model.training:
            return task
        return task + factor * torch.stack([norm.weight.abs().sum() for norm in norms]).sum()

    return loss
