"""Look at a model without leaving a trace: modes, active sets and saliency are put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import nn

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.graph import ChannelModel

__all__ = ["channels", "preserved"]


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore each module's training flag, the active sets and the saliency setting on exit."""
    modes = [(module, module.training) for module in model.modules()]
    active, reduction = {}, None
    if isinstance(model, ChannelModel):
        active, reduction = model.active, model.saliency_reduction
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        if isinstance(model, ChannelModel):
            model.set_active(active)
            model.saliency_reduction = reduction


@contextlib.contextmanager
def channels(model: nn.Module, sets: Mapping[str, ChannelSet] | None) -> Iterator[None]:
    """Activate ``sets`` (None: as it is) and measure no saliency while entered."""
    with preserved(model):
        if isinstance(model, ChannelModel):
            model.saliency_reduction = None
            if sets is not None:
                model.set_active(dict(sets))
        yield
