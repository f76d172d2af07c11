"""Turning a dense layer into its sparse counterpart without copying a parameter."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from dcx_kernels.errors import expected

__all__ = ["adopt"]

M = TypeVar("M", bound=nn.Module)


def adopt(cls: type[M], layer: nn.Module, dense: type[nn.Module]) -> M:
    """Return an instance of ``cls`` with the parameters, buffers, settings and mode of ``layer``.

    Hooks stay behind: they would see compact tensors where they expect dense ones.

    Raises:
        TypeError: if ``layer`` is neither exactly a ``dense`` nor a ``cls``: a subclass may compute
            otherwise.
        ValueError: if ``layer`` has hooks.
    """
    if type(layer) not in (dense, cls):
        raise TypeError(expected(f"a {dense.__name__}", type(layer).__name__, "from_dense"))
    for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        if getattr(layer, kind):
            what = "a layer without hooks (they would see compact tensors)"
            raise ValueError(expected(what, kind, type(layer).__name__))
    new = cls.__new__(cls)
    new.__dict__ = dict(layer.__dict__)
    new._parameters = dict(layer._parameters)
    new._buffers = dict(layer._buffers)
    return new
