"""Whether an operator's kernel may be called without torch's dispatcher: nobody else looks on."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["direct"]


def direct(x: Tensor) -> bool:
    """Tell whether calling the kernel is all there is to do for x.

    Autograd, torch.compile, modes (FLOP counters, fake tensors), subclasses and functorch need the
    operator; without them, dispatching it costs 30 to 60 us, more than a small layer of one image.
    """
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )
