"""What the procedures have in common: their loaders, optimizers, and the ends of their stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.data import ImageData, Loader, eval_loader, train_loader
from dcx_kernels.graph import ChannelGroup, ChannelModel, compact
from dcx_kernels.optim import SGD
from dcx_kernels.recipes.config import TrainConfig
from dcx_kernels.recipes.run import Run
from dcx_kernels.selectors import Selector
from dcx_kernels.train import rng
from dcx_kernels.train.evaluate import evaluate
from dcx_kernels.train.recalibrate import recalibrate

__all__ = [
    "Loaders",
    "Stage",
    "channel_sgd",
    "cut_out",
    "first_channels",
    "make_loaders",
    "measure_if_needed",
    "settle",
    "train_plain",
]

_TEST_BATCH = 256


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


def make_loaders(
    data: ImageData,
    batch_size: int,
    augment: bool | str,
    seed: int,
    device: torch.device,
    channels_last: bool = False,
) -> Loaders:
    """Return the batches of a run.

    Args:
        data: the images.
        batch_size: training images per step.
        augment: whether they are augmented as suits the data, or how. Images that are not mirrored
            of their own accord, such as digits, never are.
        seed: of their order and augmentation.
        device: where they are.
        channels_last: memory layout.
    """

    def training(how: str) -> Loader:
        return train_loader(
            data,
            batch_size,
            augment=how,
            seed=seed,
            device=device,
            channels_last=channels_last,
        )

    largest = max(batch_size, _TEST_BATCH)
    test = eval_loader(data, largest, device=device, channels_last=channels_last)
    return Loaders(training(_augmentation(data, augment)), training("none"), test)


def _augmentation(data: ImageData, augment: bool | str) -> str:
    if isinstance(augment, bool):
        return data.augment if augment else "none"
    return data.augment if "flip" in augment and "flip" not in data.augment else augment


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


def settle(
    model: ChannelModel, selector: Selector, loaders: Loaders, config: TrainConfig, arm: str
) -> Stage:
    """Activate the final channels of a trained network, and evaluate it."""
    sets = selector.final()
    model.set_active(sets)
    accuracy = evaluate(model, loaders.test).accuracy
    if not config.recalibrate:
        return Stage(arm, model, sets, accuracy)
    recalibrate(model, loaders.plain, batches=config.recalibrate_batches)
    return Stage(arm, model, sets, evaluate(model, loaders.test).accuracy, accuracy)


def cut_out(
    selected: Stage, loaders: Loaders, config: TrainConfig, run: Run, arm: str = "thin"
) -> Stage:
    """Cut the selection out as a plain network, and train that for ``config.thin_epochs``.

    The optimizer is fresh and the learning rate starts again. Without such epochs the network is
    only cut out: it computes what the selected channels of the trained one do.
    """
    if not isinstance(selected.model, ChannelModel) or selected.sets is None:
        raise ValueError("expected a stage with selected channels to fine-tune")
    model = compact(selected.model)
    if loaders.train.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.thin_epochs > 0:
        rng.seed(config.seed)
        sets = {name: s.indices.tolist() for name, s in selected.sets.items()}
        optimizer = _plain_sgd(model, config)
        trainer = run.trainer(arm, model, None, optimizer, config.schedule, sets=sets)
        trainer.fit(loaders.train, config.thin_epochs, eval_loader=loaders.test)
    return Stage(arm, model, selected.sets, evaluate(model, loaders.test).accuracy)


def train_plain(
    model: nn.Module, loaders: Loaders, config: TrainConfig, run: Run, arm: str = "dense"
) -> Stage:
    """Train an ordinary network with the same recipe: the baseline."""
    rng.seed(config.seed)
    trainer = run.trainer(arm, model, None, _plain_sgd(model, config), config.schedule)
    trainer.fit(loaders.train, config.epochs, eval_loader=loaders.test)
    return Stage(arm, model, None, evaluate(model, loaders.test).accuracy)


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


def measure_if_needed(model: ChannelModel, selector: Selector, config: TrainConfig) -> None:
    """Let backward measure saliency if the selector looks at it."""
    model.saliency_reduction = config.saliency if selector.needs_saliency else None


def channel_sgd(model: ChannelModel, config: TrainConfig) -> Optimizer:
    """Return the optimizer of a converted model."""
    return SGD(
        model,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov and config.momentum > 0,
        weight_decay=config.weight_decay,
        inactive=config.inactive,
    )


def _plain_sgd(model: nn.Module, config: TrainConfig) -> Optimizer:
    return torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov and config.momentum > 0,
        weight_decay=config.weight_decay,
        fused=True,
    )
