"""Thin models on disk: one safetensors file, weights and a manifest of widths; no pickled code."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.errors import CheckpointError, expected
from dcx_kernels.graph.compact import Widths, layer_widths, shrink_, thin_state
from dcx_kernels.graph.compact import compact as _compact
from dcx_kernels.graph.model import ChannelModel

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
    """
    if isinstance(model, ChannelModel):
        state, widths, active = thin_state(model), layer_widths(_compact(model)), model.active
    else:
        state, widths = dict(model.state_dict()), layer_widths(model)
    manifest = {
        "format": _FORMAT,
        "widths": widths,
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


def load_compact(path: str | Path, model: nn.Module) -> nn.Module:
    """Read a thin model back.

    Args:
        path: a file that `save_compact` wrote.
        model: the dense architecture, e.g. ``resnet50(num_classes=10)``; it is copied, its
            weights are not read.

    Returns:
        The thin model, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: if the file is missing, corrupt, or of another architecture.
    """
    manifest, state = _read(Path(path))
    thin = copy.deepcopy(model).to("meta")
    try:
        shrink_(thin, _widths_of(manifest))
        thin.load_state_dict(state, assign=True)
    except (ValueError, RuntimeError) as error:
        what = f"a thin {type(model).__name__}"
        raise CheckpointError(expected(what, f"another model: {error}", str(path))) from error
    for (name, buffer), original in zip(thin.named_buffers(), model.buffers(), strict=True):
        if buffer.is_meta:  # non-persistent: not in the file
            owner, _, leaf = name.rpartition(".")
            thin.get_submodule(owner)._buffers[leaf] = original.detach().clone().cpu()
    return thin.eval()


def read_manifest(path: str | Path) -> dict[str, object]:
    """Return the manifest of a thin model on disk: format, widths, active sets.

    Raises:
        CheckpointError: if the file is missing, corrupt or something else.
    """
    return _read(Path(path))[0]


def _read(path: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
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
