"""How many bytes autograd keeps between forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["saved_bytes"]


def saved_bytes(forward: Callable[[], object], model: nn.Module) -> int:
    """Count what one forward saves for backward.

    Everything counts that autograd keeps and that is not a parameter of ``model``: activations,
    masks, indices, and packed copies of weights. Tensors that share memory count once, and a view
    counts as the whole memory it keeps alive.

    Args:
        forward: runs the forward pass; its result is dropped.
        model: the model whose parameters exist anyway and do not count.

    Returns:
        Bytes.
    """
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    # the storages stay referenced here, so that no address is used twice
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor.detach()  # the tensor itself would make a reference cycle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())
