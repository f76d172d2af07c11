"""Trained weights to start from: those of a run, a checkpoint, or a file of another program."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dcx_kernels.errors import CheckpointError, expected
from dcx_kernels.train import checkpoint
from dcx_kernels.train.loop import CHECKPOINT

__all__ = ["checksum", "load_weights", "weights_file"]

_DENSE = Path("checkpoints") / "dense" / CHECKPOINT
_TORCH = (".pt", ".pth", ".bin")


def weights_file(source: str | Path) -> Path:
    """Return the file that ``source`` means: itself, or the dense network's of a run directory.

    Raises:
        CheckpointError: if there is none.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / _DENSE).is_file():
            hint = "train it with --compare dense"
            raise CheckpointError(f"{path} holds no trained dense network ({_DENSE}): {hint}")
        return path / _DENSE
    if not path.is_file():
        raise CheckpointError(f"expected trained weights at {path}: no such file")
    return path


def checksum(source: str | Path) -> int:
    """Return the CRC-32 of the file that ``source`` means: which weights a run began with."""
    crc = 0
    with weights_file(source).open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def load_weights(model: nn.Module, source: str | Path) -> None:
    """Give a network the weights and running statistics of a trained one.

    Args:
        model: the network; nothing of it changes unless everything fits.
        source: a run directory (its dense network); a training checkpoint; a safetensors file; or a
            ``.pt``, ``.pth`` or ``.bin`` file that torch can load without running code, with a
            state_dict in it, or one under "state_dict" or "model".

    Raises:
        CheckpointError: if the file cannot be read, or naming the first entry that does not fit.
    """
    path = weights_file(source)
    found = _read(path)
    own = model.state_dict()
    for name in [*own, *found]:
        mine, theirs = _shape(own.get(name)), _shape(found.get(name))
        if mine != theirs:
            # older programs did not save it, and nothing depends on it
            if name.endswith("num_batches_tracked") and name not in found:
                continue
            raise CheckpointError(expected(f"{name} of {mine}", theirs, str(path)))
    with torch.no_grad():
        for name, tensor in own.items():
            if name in found:
                tensor.copy_(found[name])


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.suffix in _TORCH:
        try:
            state: Any = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{path} holds no weights that can be read: {reason}") from error
    else:
        try:
            with safe_open(str(path), framework="pt") as file:
                ours = "dcx_checkpoint" in (file.metadata() or {})
            state = checkpoint.load(path)["model"] if ours else load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is no safetensors file, or damaged: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    tensors = isinstance(state, Mapping) and all(isinstance(v, Tensor) for v in state.values())
    if not tensors:
        raise CheckpointError(expected("a state_dict of tensors", type(state).__name__, str(path)))
    weights: Mapping[str, Tensor] = state
    return weights


def _shape(tensor: Tensor | None) -> str:
    return "no such entry" if tensor is None else f"shape {tuple(tensor.shape)}"
