"""One checkpoint, one safetensors file: tensors by name, everything else as JSON in the header.

Never pickle. A file is replaced atomically: whatever goes wrong, the previous one survives.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dcx_kernels.errors import CheckpointError, expected
from dcx_kernels.train.atomic import replace_file
from dcx_kernels.train.tree import Tree, flatten, unflatten

__all__ = ["FORMAT", "load", "save"]

FORMAT = 1
_HEADER = "dcx_checkpoint"


def save(path: Path, state: Tree) -> None:
    """Write ``state`` to ``path``, atomically.

    Args:
        path: the file to create or replace.
        state: nested dicts, lists and tuples of tensors and JSON scalars.

    Raises:
        CheckpointError: if it cannot be written, for example because the disk is full. The
            previous file, if any, is untouched.
        TypeError: if ``state`` holds anything else than tensors and JSON scalars.
    """
    structure, tensors = flatten(state)
    stored = _storable(tensors)
    header = {"format": FORMAT, "crc32": _checksum(stored), "state": structure}
    metadata = {_HEADER: json.dumps(header)}

    def write(temporary: Path) -> None:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors would leave it readable by its owner only
        save_file(stored, str(temporary), metadata)
        temporary.chmod(mode)

    try:
        replace_file(path, write)
    except (OSError, SafetensorError) as error:
        kept = "the previous one is kept" if path.exists() else "none was there before"
        message = f"could not write checkpoint {path}: {_reason(error)}; {kept}"
        raise CheckpointError(message) from error


def load(path: Path) -> Tree:
    """Read what `save` wrote, on the CPU.

    Raises:
        CheckpointError: if the file is missing, truncated, corrupt, of another kind or of a
            newer format.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            # clone: the file's own tensors may be views of a memory map
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        message = f"checkpoint {path} is truncated or corrupt: {_reason(error)}"
        raise CheckpointError(message) from error
    header = _header(path, metadata)
    if header.get("crc32") != _checksum(tensors):
        raise CheckpointError(f"checkpoint {path} is corrupt: its checksum does not match")
    try:
        return unflatten(header["state"], tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is corrupt: no entry {error}") from error


def _header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if _HEADER not in metadata:
        raise CheckpointError(f"{path} is a safetensors file, but not a training checkpoint")
    try:
        header = json.loads(metadata[_HEADER])
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path} is corrupt: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        got = header.get("format") if isinstance(header, dict) else header
        raise CheckpointError(expected(f"checkpoint format {FORMAT}", got, str(path)))
    return header


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, contiguous and without shared memory: the format asks so."""
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu").contiguous()
        pointer = value.untyped_storage().data_ptr()
        if pointer in seen:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        stored[name] = value
    return stored


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """Return the CRC-32 of names and bytes: safetensors itself does not notice a flipped bit."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        data = tensors[name].reshape(-1).view(torch.uint8).numpy()
        crc = zlib.crc32(data.data, crc)
    return crc


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).removeprefix("Error while serializing: ")
