"""Policies that choose the active channels: tensors in, sets out, no model."""

from __future__ import annotations

from dcx_kernels.selectors.base import GroupLike, GroupsLike, Selector, State
from dcx_kernels.selectors.cucb import CUCB
from dcx_kernels.selectors.dcp import DCP
from dcx_kernels.selectors.random import Random
from dcx_kernels.selectors.ranking import channel_budget, global_top
from dcx_kernels.selectors.schedules import utility_decay
from dcx_kernels.selectors.static import Static

__all__ = [
    "CUCB",
    "DCP",
    "GroupLike",
    "GroupsLike",
    "Random",
    "Selector",
    "State",
    "Static",
    "channel_budget",
    "global_top",
    "utility_decay",
]
