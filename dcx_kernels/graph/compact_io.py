"""Thin models on disk: one safetensors file, weights and a manifest of widths; no pickled code."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, fx, nn

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.errors import CheckpointError, expected
from dcx_kernels.graph.compact import compact as _compact
from dcx_kernels.graph.compact import is_plain
from dcx_kernels.graph.convert import convert
from dcx_kernels.graph.loading import load_assign
from dcx_kernels.graph.model import ChannelModel
from dcx_kernels.graph.shrink import Widths, layer_widths, shrink_
from dcx_kernels.graph.thin import ThinModule
from dcx_kernels.graph.trace import LeafModules

__all__ = ["load_compact", "read_manifest", "save_compact"]

_FORMAT = "dcx_kernels.compact/1"


def save_compact(
    model: nn.Module, path: str | Path, active: Mapping[str, ChannelSet] | None = None
) -> None:
    """Write a thin model: of a converted model its current selection, or a thin model itself.

    The file appears whole or not at all.

    Args:
        model: a `ChannelModel`, or what `compact` made of one.
        path: file to write, by custom ``*.safetensors``.
        active: for a thin model, the sets it was cut with; kept in the manifest for the record.

    Raises:
        CheckpointError: if the file cannot be written; an existing one is untouched.
        TypeError: on a thin network that is a graph: save the converted model instead.
    """
    thin, graph = model, None
    if isinstance(model, ChannelModel):
        thin, active = _compact(model), model.active
        if not is_plain(model):
            graph = {**model.structure.policy._asdict(), "example_shapes": model.example_shapes}
    elif isinstance(model, (fx.GraphModule, ThinModule)):
        what = "the converted model (a thin graph cannot be rebuilt without its policy)"
        raise TypeError(expected(what, "its thin network", "save_compact"))
    state = dict(thin.state_dict())
    manifest = {
        "format": _FORMAT,
        "graph": graph,
        "widths": layer_widths(thin),
        "active": {name: s.indices.tolist() for name, s in (active or {}).items()},
        "num_channels": {name: s.num_channels for name, s in (active or {}).items()},
    }
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    data = serialize(_unshared(contiguous), metadata={"dcx": json.dumps(manifest)})
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: the thin model was not written ({error})") from error


def load_compact(path: str | Path, model: nn.Module, leaf_modules: LeafModules = ()) -> nn.Module:
    """Read a thin model back.

    Args:
        path: a file that `save_compact` wrote.
        model: the dense architecture, e.g. ``resnet50(num_classes=10)``; it is copied, its
            weights are not read.
        leaf_modules: as `convert` was given.

    Returns:
        The thin model, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: if the file is missing, corrupt, or of another architecture.
    """
    manifest, state = _read(Path(path))
    if manifest.get("graph"):
        return _rebuild(manifest, state, model, leaf_modules, str(path))
    thin = copy.deepcopy(model).to("meta")
    try:
        shrink_(thin, _widths_of(manifest))
        load_assign(thin, state)
    except (ValueError, RuntimeError) as error:
        what = f"a thin {type(model).__name__}"
        raise CheckpointError(expected(what, f"another model: {error}", str(path))) from error
    for (name, buffer), original in zip(thin.named_buffers(), model.buffers(), strict=True):
        if buffer.is_meta:  # non-persistent: not in the file
            owner, _, leaf = name.rpartition(".")
            thin.get_submodule(owner)._buffers[leaf] = original.detach().clone().cpu()
    return thin.eval()


def _rebuild(
    manifest: dict[str, Any],
    state: dict[str, Tensor],
    model: nn.Module,
    leaf_modules: LeafModules,
    path: str,
) -> nn.Module:
    """Make a thin graph anew, as it was made: convert, select, cut."""
    graph, sizes = manifest["graph"], manifest["num_channels"]
    like = next(model.parameters())
    inputs = [like.new_zeros(shape) for shape in graph["example_shapes"]]
    try:
        converted = convert(
            model, inputs, graph["residual"], grouped=graph["grouped"], leaf_modules=leaf_modules
        )
        chosen = {n: ChannelSet(indices, sizes[n]) for n, indices in manifest["active"].items()}
        converted.set_active(chosen)
        thin = _compact(converted)
        load_assign(thin, state)
    except (ValueError, RuntimeError) as error:
        what = f"a thin {type(model).__name__}"
        raise CheckpointError(expected(what, f"another model: {error}", path)) from error
    return thin.eval()


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Return the manifest of a thin model on disk: format, widths, active sets.

    Raises:
        CheckpointError: if the file is missing, corrupt or something else.
    """
    return _read(Path(path))[0]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise CheckpointError(expected("a thin model file", "nothing there", str(path)))
    try:
        with safe_open(path, framework="pt") as file:
            manifest = json.loads((file.metadata() or {}).get("dcx", "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        got = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise CheckpointError(expected(f"format {_FORMAT}", repr(got), str(path)))
    return manifest, state


def _widths_of(manifest: Mapping[str, object]) -> Widths:
    widths = manifest.get("widths")
    if not isinstance(widths, dict):
        raise ValueError(expected("widths in the manifest", repr(widths)))
    return {name: (int(in_), int(out)) for name, (in_, out) in widths.items()}


def _unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy entries that share memory (a module under two names): safetensors stores each once."""
    seen: set[int] = set()
    result = {}
    for name, tensor in state.items():
        pointer = tensor.data_ptr()
        result[name] = tensor.clone() if pointer in seen and tensor.numel() else tensor
        seen.add(pointer)
    return result
