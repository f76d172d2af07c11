"""How many bytes autograd keeps between forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["saved_bytes"]


def saved_bytes(forward: Callable[[], object], model: nn.Module) -> int:
    """Count what one forward saves for backward.

    Everything counts that autograd keeps and that is not a parameter of ``model``: activations,
    masks, indices, and packed copies of weights. Tensors that share memory count once; of a memory
    that is larger than what is saved in it (a reused buffer), the span from the first to the last
    saved byte counts, so that the number does not depend on what the buffer held before.

    Args:
        forward: runs the forward pass; its result is dropped.
        model: the model whose parameters exist anyway and do not count.

    Returns:
        Bytes.
    """
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = []  # stay referenced, so that no address is used twice
    spans: dict[int, tuple[int, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in parameters and tensor.numel():
            storages.append(storage)
            start, end = _span(tensor)
            low, high = spans.get(address, (start, end))
            spans[address] = (min(low, start), max(high, end))
        return tensor.detach()  # the tensor itself would make a reference cycle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(high - low for low, high in spans.values())


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor in its storage, and the one behind its last."""
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset())
    return start * tensor.element_size(), (start + reach + 1) * tensor.element_size()
