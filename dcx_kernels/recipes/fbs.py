"""Feature boosting and suppression: from a trained network down the densities, with warm starts.

References:
    Gao et al., "Dynamic Channel Pruning: Feature Boosting and Suppression", section 4 and
    appendix A. https://arxiv.org/abs/1810.05331
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcx_kernels.data import Loader
from dcx_kernels.errors import expected
from dcx_kernels.graph import FBSModel, GateCost, convert_fbs, memory_access
from dcx_kernels.recipes.run import Run
from dcx_kernels.recipes.stages import Loaders
from dcx_kernels.train import rng
from dcx_kernels.train.evaluate import evaluate
from dcx_kernels.train.schedule import Schedule

__all__ = ["FBSConfig", "FBSPoint", "arm_of", "divided_every", "train_fbs"]


@dataclass(frozen=True)
class FBSConfig:
    """Everything that determines a run beside the trained network and data.

    Args:
        density: where the densities end.
        steps: densities are 1, 1 - 1/steps, 1 - 2/steps, ...
        init: ``paper`` drops gamma and draws the gates; ``fold`` starts as the trained network.
        subsample, beta_at, stats: see `dcx_kernels.GatedConv2d`.
        penalty: factor on the gates in the loss (the Lasso).
        warm_epochs: epochs at density 1.
        epochs: epochs at each density below.
        decay_every: epochs after which the learning rate is divided by 10, at each density anew.
        lr, momentum, weight_decay: of plain SGD.
        count_batches: test batches over which costs are means.
        seed: of the gates, data order and augmentation.

    Raises:
        ValueError: if one is out of its range.
    """

    density: float = 0.5
    steps: int = 10
    init: Literal["paper", "fold"] = "paper"
    subsample: Literal["l1", "l2", "linf", "variance"] = "l1"
    beta_at: Literal["inside", "outside"] = "inside"
    stats: Literal["batch", "active"] = "batch"
    penalty: float = 1e-8
    warm_epochs: int = 300
    epochs: int = 300
    decay_every: int = 100
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    count_batches: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(expected("a density in (0, 1]", self.density))
        for name in ("steps", "warm_epochs", "epochs", "decay_every", "count_batches"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(expected(f"{name} to be a positive whole number", repr(value)))
        if not self.lr > 0:
            raise ValueError(expected("a positive learning rate", self.lr))
        if not 0 <= self.momentum < 1:
            raise ValueError(expected("a momentum in [0, 1)", self.momentum))
        for name in ("penalty", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(expected(f"{name} of at least 0", getattr(self, name)))

    @property
    def densities(self) -> tuple[float, ...]:
        """Densities in order: computed one by one, so that no rounding adds up."""
        all_ = (1 - i / self.steps for i in range(self.steps))
        return tuple(d for d in all_ if d >= self.density - 1e-9)


@dataclass(frozen=True)
class FBSPoint:
    """The network after training at one density.

    Args:
        density: share of channels that win.
        accuracy: on the test images.
        cost: what one image computes and touches, means over test images.
    """

    density: float
    accuracy: float
    cost: GateCost


def train_fbs(
    dense: nn.Module, loaders: Loaders, config: FBSConfig, run: Run, last_only: bool = False
) -> tuple[FBSModel, list[FBSPoint]]:
    """Gate a trained network, fine-tune it at density 1, then lower the density step by step.

    Each density is an arm of the run, with checkpoints of its own, and starts from the weights of
    the one before.

    Args:
        dense: the trained network; it is copied.
        loaders: of the data it was trained on.
        config: the recipe.
        run: where log and checkpoints are.
        last_only: measure at the last density only, where the others are known already.

    Returns:
        The network at the last density, and what was reached at each that was measured.
    """
    rng.seed(config.seed)
    images, _ = next(iter(loaders.test.batches(0)))
    model = convert_fbs(
        dense, images[:1], init=config.init, subsample=config.subsample, beta_at=config.beta_at,
        stats=config.stats,
    )  # fmt: skip
    points = []
    for density in config.densities:
        model.set_density(density)
        _train(model, density, loaders, config, run)
        if last_only and density != config.densities[-1]:
            continue
        accuracy = evaluate(model, loaders.test).accuracy
        cost = memory_access(model, _images(loaders.test, config.count_batches))
        points.append(FBSPoint(density, accuracy, cost))
    return model, points


def _train(model: FBSModel, density: float, loaders: Loaders, config: FBSConfig, run: Run) -> None:
    rng.seed(config.seed)
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
    )
    arm = arm_of(density)
    schedule = divided_every(config.decay_every)
    trainer = run.trainer(arm, model, None, optimizer, schedule=schedule, density=density)
    trainer.loss_fn = _with_penalty(model, config.penalty)
    epochs = config.warm_epochs if density == 1 else config.epochs
    trainer.fit(loaders.train, epochs, eval_loader=loaders.test)


def arm_of(density: float) -> str:
    """Return the name in log and checkpoints of the training at a density."""
    return f"fbs-{density:.3g}"


def _with_penalty(model: FBSModel, factor: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss: while training, cross entropy and the Lasso on the gates."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        task = F.cross_entropy(logits, labels)
        return task + model.gate_penalty(factor) if model.training else task

    return loss


def divided_every(epochs: int) -> Schedule:
    """Return the schedule that divides the learning rate by 10 every so many epochs."""

    def factor(epoch: int, _: int) -> float:
        return float(0.1 ** (epoch // epochs))

    return factor


def _images(loader: Loader, batches: int) -> Iterator[Tensor]:
    for images, _ in islice(loader.batches(0), batches):
        yield images
