"""Train a sparse network, the ones it is compared with, and its thin network; keep every result."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.data import load
from dcx_kernels.errors import expected
from dcx_kernels.graph import ChannelModel, convert, save_compact
from dcx_kernels.graph.carry import refill
from dcx_kernels.recipes.measure import ArmResult, measure
from dcx_kernels.recipes.methods import Config, make_selector, train_selected
from dcx_kernels.recipes.networks import build_network, check_trains
from dcx_kernels.recipes.run import Run
from dcx_kernels.recipes.stages import cut_out, make_loaders, train_plain
from dcx_kernels.recipes.weights import checksum, load_weights
from dcx_kernels.train.atomic import replace_text
from dcx_kernels.train.log import read_rows
from dcx_kernels.train.machine import describe_device, describe_machine, versions
from dcx_kernels.train.progress import Progress, Silent

__all__ = [
    "COMPARISONS",
    "RESULT",
    "THIN",
    "Experiment",
    "Outcome",
    "build_dense",
    "find_device",
    "run_experiment",
]

COMPARISONS = ("mask", "dense")
RESULT = "result.json"
THIN = "thin.safetensors"
_ORDER = ("dense", "mask", "sparse", "thin")


@dataclass(frozen=True)
class Experiment:
    """What is trained on what.

    Args:
        data: name or path of the data set.
        model: name of the network, see `build_network`.
        width: factor on all its channel counts.
        compare: networks trained beside the sparse one, with the same initial weights, data order
            and settings: out of ``mask`` and ``dense``.
        device: where it runs.
        channels_last: memory layout of images and weights.
        image_size: height and width the images are scaled to.
        weights: trained weights that all networks begin with, see `load_weights`; random if None.
    """

    data: str = "digits"
    model: str = "vgg19"
    width: float = 1.0
    compare: tuple[str, ...] = ()
    device: str = "cpu"
    channels_last: bool = False
    image_size: int = 32
    weights: str | None = None

    def __post_init__(self) -> None:
        for name in self.compare:
            if name not in COMPARISONS:
                raise ValueError(expected(f"compare to be out of {COMPARISONS}", repr(name)))


@dataclass(frozen=True)
class Outcome:
    """What a run leaves.

    Args:
        result: the content of ``result.json``.
        thin: the thin network, trained.
        example: one image, shape (1, C, H, W), on the device of the network.
    """

    result: dict[str, Any]
    thin: nn.Module
    example: Tensor


def run_experiment(
    experiment: Experiment,
    config: Config,
    directory: Path,
    *,
    resume: bool = False,
    checkpoint_every: int | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Run the whole comparison, or what is left of it.

    Args:
        experiment: what is trained on what.
        config: how.
        directory: where log, checkpoints, ``result.json`` and ``thin.safetensors`` go.
        resume: continue from the checkpoints in ``directory``; stages without one start afresh.
        checkpoint_every: steps between checkpoints, beside the one after each epoch.
        progress: what the user sees meanwhile.

    Raises:
        DataError: if the data set cannot be read.
        CheckpointError: if a checkpoint is damaged, of another run, or cannot be written; if the
            trained weights cannot be read or are of another network.
        NonFiniteError: if a loss or saliency is not finite.
        ValueError: on settings that fit no network or device.
    """
    device = find_device(experiment.device)
    data = load(experiment.data, image_size=experiment.image_size)
    loaders = make_loaders(
        data, config.batch_size, config.augment, config.seed, device, experiment.channels_last
    )
    example = next(iter(loaders.test.batches(0)))[0][:1]
    shared = {"data": experiment.data, "model": experiment.model, "width": experiment.width}
    shared |= {"classes": data.num_classes, "image_size": experiment.image_size}
    identity = {**shared, "method": config.method, **asdict(config)}
    if experiment.weights is not None:  # by their content: a file may move while a run is stopped
        identity["weights"] = checksum(experiment.weights)
    progress = progress or Silent()
    run = Run(directory, identity, resume, checkpoint_every, progress)

    def dense() -> nn.Module:
        network = build_dense(shared, config.seed, device, experiment.channels_last)
        if experiment.weights is not None:
            load_weights(network, experiment.weights)
        return network

    def selectable(execution: Literal["sparse", "mask"]) -> ChannelModel:
        network = dense()
        return convert(network, example, config.residual, execution, saliency=config.saliency)

    check_trains(dense(), example, data.num_classes, experiment.model)
    try:
        sparse_model = selectable("sparse")
        sparse = train_selected(sparse_model, loaders, config, run)
        stages = {"sparse": sparse}
        if "mask" in experiment.compare:
            stages["mask"] = train_selected(selectable("mask"), loaders, config, run, "mask")
        if "dense" in experiment.compare:
            stages["dense"] = train_plain(dense(), loaders, config, run)
        stages["thin"] = thin = cut_out(sparse, loaders, config, run)
    finally:
        progress.close()

    rows = read_rows(run.log_path)
    images, labels = next(iter(loaders.train.batches(0)))
    selector = make_selector(sparse_model.groups, config, len(loaders.train))
    # a step of the selection: the first one, but behind a warm-up
    chosen = sparse.sets if config.selecting.start else selector.select()
    chosen = chosen if config.selecting else None
    # a mask computes all; what is thin costs what it was cut from, and may not be traceable itself
    computed = {"mask": dense(), "thin": sparse_model}
    arms = [
        measure(
            stages[arm],
            images,
            labels,
            rows,
            config.selecting,
            first=chosen if arm in ("mask", "sparse") else None,
            computed=computed.get(arm),
        )
        for arm in _ORDER
        if arm in stages
    ]
    result = _result(experiment, config, shared, device, arms, selector.groups, sparse.sets or {})
    # by way of the converted model: that one knows how a thin graph is built again
    trained = copy.deepcopy(sparse_model)
    refill(trained, thin.model)
    save_compact(trained, directory / THIN)
    replace_text(directory / RESULT, json.dumps(result, indent=2) + "\n")
    return Outcome(result, thin.model, example)


def build_dense(
    identity: Mapping[str, Any],
    seed: int = 0,
    device: torch.device | None = None,
    channels_last: bool = False,
) -> nn.Module:
    """Build the dense network that a run is about.

    Args:
        identity: ``model``, ``width`` and ``classes`` of the run.
        seed: of the initial weights.
        device: where it goes.
        channels_last: memory layout of its weights.
    """
    torch.manual_seed(seed)
    model = build_network(identity["model"], identity["classes"], identity["width"])
    model = model.to(device or torch.device("cpu"))
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def find_device(name: str) -> torch.device:
    """Return the device of that name.

    Raises:
        ValueError: if there is none, by that name or on this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(expected("a device such as cpu or cuda:0", repr(name))) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"no CUDA device is available here, got device {name!r}")
    return device


def _result(
    experiment: Experiment,
    config: Config,
    shared: Mapping[str, Any],
    device: torch.device,
    arms: list[ArmResult],
    channels: Mapping[str, int],
    final: Mapping[str, ChannelSet],
) -> dict[str, Any]:
    return {
        "method": config.method,
        "title": config.title,
        "experiment": {**asdict(experiment), "compare": list(experiment.compare), **shared},
        "config": asdict(config),
        "arms": [arm.as_dict() for arm in arms],
        "channels": dict(channels),
        "final": {name: len(channel_set) for name, channel_set in final.items()},
        "machine": {**describe_machine(), "device": describe_device(device)},
        "versions": versions(),
    }
