"""SGD on active slices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dcx_kernels.errors import expected
from dcx_kernels.optim._active import ActiveSliceOptimizer, Inactive
from dcx_kernels.optim._task import SliceTask

__all__ = ["SGD"]


class SGD(ActiveSliceOptimizer):
    """`torch.optim.SGD` that updates active slices only.

    Args:
        model: the module to train.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in `torch.optim.SGD`.
        params: param groups of the model, if not all parameters alike.
        inactive: ``"frozen"`` or ``"decay"``, see `ActiveSliceOptimizer`.

    Raises:
        ValueError: on hyper-parameters that torch would refuse too, or an unknown ``inactive``.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        params: Iterable[Any] | None = None,
        inactive: Inactive = "frozen",
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(expected("a tensor lr of 1 element", lr.numel()))
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if not value >= 0.0:  # NaN neither
                raise ValueError(expected(f"{name} >= 0", value))
        if nesterov and (momentum <= 0 or dampening != 0):
            what = "momentum > 0 and dampening = 0 with nesterov"
            raise ValueError(expected(what, f"momentum {momentum}, dampening {dampening}"))
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": None,
            "differentiable": False,
            "fused": None,
        }
        super().__init__(model, params, defaults, inactive)

    def _create_state(
        self, state: dict[str, Any], parameter: Tensor, group: dict[str, Any]
    ) -> bool:
        if group["momentum"] == 0 or state.get("momentum_buffer") is not None:
            return False
        state["momentum_buffer"] = torch.zeros_like(parameter)
        return True

    def _update(self, kernels: Any, group: dict[str, Any], tasks: list[SliceTask]) -> None:
        buffers = [task.state["momentum_buffer"] for task in tasks] if group["momentum"] else None
        kernels.sgd_slices_(
            [task.parameter for task in tasks],
            [task.grad for task in tasks],
            buffers,
            [task.slice for task in tasks],
            [task.fresh for task in tasks],
            leaves=[task.leaf for task in tasks],
            lr=group["lr"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            scratch=self._scratch,
        )
