"""``dcx export``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.cli.console import make_console
from dcx_kernels.cli.tables import cost_table
from dcx_kernels.errors import CheckpointError, expected
from dcx_kernels.graph import (
    ChannelModel,
    Cost,
    compact,
    convert,
    cost,
    load_compact,
    save_compact,
)
from dcx_kernels.graph.carry import refill
from dcx_kernels.graph.compact_io import read_manifest
from dcx_kernels.recipes.experiment import RESULT, THIN, build_dense
from dcx_kernels.recipes.methods import config_of, make_selector
from dcx_kernels.recipes.networks import check_runs
from dcx_kernels.recipes.onnx import export_onnx
from dcx_kernels.selectors import Selector, Static
from dcx_kernels.train import checkpoint

__all__ = ["export"]


def export(
    *,
    source: Path,
    onnx: Path | None,
    thin: Path | None,
    model: str | None,
    width: float | None,
    classes: int | None,
    image_size: int,
) -> int:
    """Write a trained network as ONNX, as a thin checkpoint, or both; print widths and cost.

    Args:
        source: a run directory, a thin file or a training checkpoint.
        onnx: ONNX file to write.
        thin: thin checkpoint to write.
        model: network, for a thin file without its run.
        width: likewise.
        classes: likewise.
        image_size: height and width of the input.
    """
    if onnx is None and thin is None:
        raise ValueError("expected --onnx FILE or --thin FILE, got neither: nothing to write")
    if image_size < 1:
        raise ValueError(expected("a positive --image-size", image_size))
    if not source.exists():
        raise ValueError(f"expected a run directory or a checkpoint, got {source}: no such file")
    console = make_console()
    example = torch.zeros(1, 3, image_size, image_size)
    path = source / THIN if source.is_dir() else source
    if not path.exists():
        hint = "train has not finished; export one of its checkpoints"
        raise CheckpointError(f"no {THIN} in {source}: {hint}")
    if _is_training_checkpoint(path):
        dense, converted = _from_training(checkpoint.load(path), example, path)
        network, price = compact(converted), cost(converted)
    else:
        if thin is not None:
            raise ValueError(f"{path} is a thin checkpoint already: copy the file")
        dense, network, price = _from_thin(path, _identity(path, model, width, classes), example)
    if thin is not None:
        save_compact(converted, thin)
        console.print(f"{thin}: thin checkpoint", highlight=False)
    if onnx is not None:
        console.print(f"{onnx}: {export_onnx(network, example, onnx)}", highlight=False)
    title = f"widths, and cost of one image of {image_size}x{image_size}"
    console.print(cost_table(price, cost(dense, example), title))
    return 0


def _is_training_checkpoint(path: Path) -> bool:
    try:
        with safe_open(str(path), framework="pt") as file:
            return "dcx_checkpoint" in (file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is no safetensors file, or damaged: {error}") from error


def _from_thin(
    path: Path, identity: Mapping[str, Any], example: Tensor
) -> tuple[nn.Module, nn.Module, Cost]:
    """Return the dense network, the thin one of a thin file, and its cost."""
    dense = build_dense(identity)
    wanted = check_runs(dense, example, identity["model"])
    network = load_compact(path, dense)
    found = check_runs(network, example, str(path))
    assert isinstance(found, Tensor)
    assert isinstance(wanted, Tensor)
    if found.shape != wanted.shape:
        what = f"a network of {wanted.shape[1]} classes"
        raise CheckpointError(expected(what, found.shape[1], str(path)))
    manifest = read_manifest(path)
    if not manifest["graph"]:
        return dense, network, cost(network, example)
    # a thin graph may have one for each mode, and is not traced again: ask what it was cut from
    policy = manifest["graph"]
    converted = convert(dense, example, policy["residual"], grouped=policy["grouped"])
    _activate(converted, manifest["active"])
    return dense, network, cost(converted)


def _from_training(
    state: Mapping[str, Any], example: Tensor, path: Path
) -> tuple[nn.Module, ChannelModel]:
    """Return the dense network and the converted one with its final channels as of now."""
    identity = state["config"]
    try:
        config, dense = config_of(identity), build_dense(identity)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} was not written by dcx train: no {error}") from error
    check_runs(dense, example, identity["model"])
    converted = convert(dense, example, config.residual)
    try:
        if "sets" in identity:
            _activate(converted, identity["sets"])
            network = compact(converted)
            network.load_state_dict(state["model"])
            refill(converted, network)
            return dense, converted
        if state["selector"] is None:
            raise CheckpointError(f"{path} is of the dense network: it has no thin form")
        steps = identity.get("steps_per_epoch", 0)
        selector: Selector = make_selector(converted.groups, config, steps)
        if state["selector"]["kind"] == "Static":
            selector = Static({name: ChannelSet.full(n) for name, n in selector.groups.items()})
        selector.load_state_dict(state["selector"]["state"])
        converted.load_state_dict(state["model"])
    except (RuntimeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        what = f"a checkpoint of {identity['model']}"
        raise CheckpointError(expected(what, f"another: {error}", str(path))) from error
    converted.set_active(selector.final())
    return dense, converted


def _activate(model: ChannelModel, sets: Mapping[str, list[int]]) -> None:
    sizes = {name: group.num_channels for name, group in model.groups.items()}
    model.set_active({name: ChannelSet(ids, sizes[name]) for name, ids in sets.items()})


def _identity(
    path: Path, model: str | None, width: float | None, classes: int | None
) -> dict[str, Any]:
    """Return what the dense network is, from the options or from the run the file lies in."""
    result = path.parent / RESULT
    known: dict[str, Any] = {}
    if result.exists():
        known = json.loads(result.read_text(encoding="utf-8"))["experiment"]
    given = {"model": model, "width": width, "classes": classes}
    identity = {key: known.get(key) if value is None else value for key, value in given.items()}
    absent = [f"--{key}" for key, value in identity.items() if value is None]
    if absent:
        raise ValueError(f"{path} lies in no run directory: give {', '.join(absent)}")
    return identity
