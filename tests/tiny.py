"""Tiny networks out of a forward and some layers, and what must hold of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import dcx_kernels as dcx
from zoo import Case, check

__all__ = ["Forward", "Net", "between", "checked", "conv", "selectable"]

Forward = Callable[[Any, Tensor], Any]


class Net(nn.Module):
    """Layers by name, and a forward."""

    def __init__(self, forward: Forward, **layers: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        """Run the given forward."""
        return self._forward(self, x)


def conv(in_: int, out: int, kernel: int = 1, **options: Any) -> nn.Conv2d:
    """Return a convolution that keeps the extents at stride 1."""
    return nn.Conv2d(in_, out, kernel, padding=kernel // 2, **options)


def checked(
    forward: Forward, residual: str = "union", runs: str = "equal", **layers: nn.Module
) -> dcx.ChannelModel:
    """Check a network (sparse is masked is thin, cost is counted) and return its model."""
    return check(Case(lambda: Net(forward, **layers), 6, 3), residual, runs, steps=2)


def selectable(model: dcx.ChannelModel) -> list[str]:
    """Name the groups whose channels may be switched off."""
    return [name for name, group in model.groups.items() if group.selectable]


def between(form: Forward, residual: str = "union", **layers: nn.Module) -> dcx.ChannelModel:
    """Check a network that does ``form`` between two convolutions, over 7 channels."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.b(form(m, m.norm(m.a(x)))).mean((2, 3)))

    layers = {"a": conv(3, 7, 3), "norm": nn.BatchNorm2d(7), **layers}
    return checked(forward, residual, **layers, b=conv(7, 5), head=nn.Linear(5, 3))
