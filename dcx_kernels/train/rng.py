"""The state of every random number generator a training step may draw from."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["capture", "capture_torch", "restore", "restore_torch", "seed"]


def seed(number: int) -> None:
    """Seed the generators of torch, python and numpy."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002


def capture() -> dict[str, Any]:
    """Return the states of the generators of torch (CPU, and CUDA if there), python and numpy."""
    version, words, gauss = random.getstate()
    name, key, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "torch": capture_torch(),
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "name": name,
            "key": torch.from_numpy(np.asarray(key).astype(np.int64)),
            "rest": [int(position), int(has_gauss), float(cached)],
        },
    }


def restore(state: dict[str, Any]) -> None:
    """Set the generators to a captured state; CUDA generators that are not here are left out."""
    restore_torch(state["torch"])
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    key = numpy["key"].numpy().astype(np.uint32)
    np.random.set_state((numpy["name"], key, *numpy["rest"]))  # noqa: NPY002


def capture_torch() -> list[Tensor]:
    """Return the states of torch's generators: the CPU's, then one per CUDA device in use."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if cuda else [])]


def restore_torch(states: list[Tensor]) -> None:
    """Set torch's generators to states from `capture_torch`."""
    torch.set_rng_state(states[0])
    if torch.cuda.is_available():
        for device, state in enumerate(states[1 : 1 + torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, device)
