"""Registration of raw operators: schema, implementation for every device, fake, FLOP formula.

Raw operators carry no autograd: the `torch.autograd.Function` lives outside the operator, which
costs a third of what ``register_autograd`` does a call and still traces into one graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

__all__ = ["NAMESPACE", "register"]

NAMESPACE = "dcx_kernels"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def register(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int] | None = None,
) -> Callable[..., Any]:
    """Define ``dcx_kernels::<schema>`` and return its overload.

    Args:
        schema: name and signature, as in native_functions.yaml.
        implementation: runs on every device.
        fake: returns outputs of the right shape, dtype and layout without computing.
        flops: FLOPs (two a multiply-accumulate) from shapes, ``out_shape`` included.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    if flops is not None:
        register_flop_formula(packet)(flops)
    overload: Callable[..., Any] = packet.default
    return overload
