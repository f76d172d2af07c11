"""AdamW on active slices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dcx_kernels.errors import expected
from dcx_kernels.optim._active import ActiveSliceOptimizer, Inactive
from dcx_kernels.optim._task import SliceTask

__all__ = ["AdamW"]


class AdamW(ActiveSliceOptimizer):
    """`torch.optim.AdamW` on active slices only; one step count a parameter, as in torch.

    Args:
        model: the module to train.
        lr, betas, eps, weight_decay, amsgrad, maximize: as in `torch.optim.AdamW`.
        params: param groups of the model, if not all parameters alike.
        inactive: ``"frozen"`` or ``"decay"``, see `ActiveSliceOptimizer`. With "decay", what is
            inactive keeps moving along its old first moment, as its gradient is zero, not absent.

    Raises:
        ValueError: on hyper-parameters that torch would refuse too, or an unknown ``inactive``.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        params: Iterable[Any] | None = None,
        inactive: Inactive = "frozen",
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(expected("a tensor lr of 1 element", lr.numel()))
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0.0:  # NaN neither
                raise ValueError(expected(f"{name} >= 0", value))
        for index, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(expected(f"beta {index} in [0, 1)", beta))
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": None,
            "capturable": False,
            "differentiable": False,
            "fused": None,
            "decoupled_weight_decay": True,
        }
        super().__init__(model, params, defaults, inactive)

    def _create_state(
        self, state: dict[str, Any], parameter: Tensor, group: dict[str, Any]
    ) -> bool:
        if state:  # torch's fused optimizer, whose state it may be, counts on the GPU
            state["step"] = state["step"].cpu()
            return False
        state["step"] = torch.tensor(0.0)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
        if group["amsgrad"]:
            state["max_exp_avg_sq"] = torch.zeros_like(parameter)
        return True

    def _update(self, kernels: Any, group: dict[str, Any], tasks: list[SliceTask]) -> None:
        states = [task.state for task in tasks]
        kernels.adamw_slices_(
            [task.parameter for task in tasks],
            [task.grad for task in tasks],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else None,
            [state["step"] for state in states],
            [task.slice for task in tasks],
            leaves=[task.leaf for task in tasks],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            scratch=self._scratch,
        )
