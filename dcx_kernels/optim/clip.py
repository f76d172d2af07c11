"""Gradient clipping that sees compact gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dcx_kernels.errors import NonFiniteError, expected
from dcx_kernels.ops.slot import parameter_slots

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(
    model: nn.Module,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Clip the norm of all gradients of ``model``, compact and dense ones together, in place.

    Equal to `torch.nn.utils.clip_grad_norm_` on the masked network: what is absent counts as zero.

    Args:
        model: a module whose backward has run.
        max_norm: largest norm allowed.
        norm_type: order of the norm; may be ``inf``.
        error_if_nonfinite: refuse NaN and infinite norms.

    Returns:
        The norm before clipping, a scalar.

    Raises:
        NonFiniteError: if asked for and the norm is not finite.
        ValueError: if max_norm is negative.
    """
    if max_norm < 0:
        raise ValueError(expected("max_norm >= 0", max_norm))
    slots = {slot.parameter: slot for _, slot in parameter_slots(model)}
    gradients = [slot.gradient() for slot in slots.values()]
    tensors = [gradient.tensor for gradient in gradients if gradient is not None]
    plain = [p.grad for p in model.parameters() if p.grad is not None and p not in slots]
    tensors += plain
    if not tensors:
        return torch.tensor(0.0)
    norms = torch._foreach_norm(tensors, norm_type)
    total: Tensor = torch.linalg.vector_norm(
        torch.stack([n.to(norms[0].device) for n in norms]), norm_type
    )
    if error_if_nonfinite and not torch.isfinite(total):
        raise NonFiniteError(expected("a finite gradient norm", float(total)))
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for slot in slots.values():
        slot.scale_(factor)
    for grad in plain:
        grad.mul_(factor.to(grad.device))
    return total
