"""Slices of norm weights and biases, moved together: hundreds of short vectors, a few calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dcx_kernels.kernels import reference
from dcx_kernels.optim._task import SliceTask

__all__ = ["VectorTasks", "vectors_alike"]


def vectors_alike(tasks: Sequence[SliceTask]) -> list[list[SliceTask]]:
    """Return the packed updates of vectors, in lists that can be moved together."""
    found: dict[object, list[SliceTask]] = {}
    for task in tasks:
        vector = task.parameter
        if task.rows is not None and vector.dim() == 1 and vector.is_contiguous():
            key = (vector.device, vector.dtype, task.fresh, tuple(task.full_tensors()))
            found.setdefault(key, []).append(task)
    return list(found.values())


class VectorTasks:
    """Packed updates of vectors that share device, dtype and names of state."""

    def __init__(self, tasks: list[SliceTask]) -> None:
        self._tasks = tasks
        lists = [task.rows.rows for task in tasks if task.rows is not None]
        self._lengths = [len(rows) for rows in lists]
        self._index = reference.number_through(lists, [len(t.parameter) for t in tasks])

    def gather(self) -> None:
        """Bring all state tensors where the kernel may write."""
        for task in self._tasks:
            task.lay_out()
        for name in self._tasks[0].full_tensors():
            full = [task.full_tensors()[name] for task in self._tasks]
            parts = reference.gather_vectors(full, self._index).split(self._lengths)
            for task, part in zip(self._tasks, parts, strict=True):
                task.tensors[name] = part

    def write_back(self) -> None:
        """Put all updated slices back in place."""
        self._scatter([t.parameter for t in self._tasks], [t.packed for t in self._tasks])
        for name in self._tasks[0].full_tensors():
            full = [task.full_tensors()[name] for task in self._tasks]
            self._scatter(full, [task.tensors[name] for task in self._tasks])

    def _scatter(self, full: list[Tensor], packed: list[Tensor]) -> None:
        reference.scatter_vectors_(full, torch.cat(packed), self._index)
