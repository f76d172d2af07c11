"""Optimizer steps on the active slices of all parameters, in one call: see `kernels.slice_steps`.

Arithmetic is fp32, or float64 in its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcx_kernels.kernels.native.cpu.slices import READER
from dcx_kernels.kernels.slice_steps import AdamwRule, SgdRule, SliceSteps

__all__ = ["adamw_slices_", "sgd_slices_"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _sgd(lines: Tensor, blocks: int, dtype: torch.dtype, rule: SgdRule) -> None:
    torch.ops.dcx_native.sgd_slices(lines, dtype, *rule)


def _adamw(lines: Tensor, blocks: int, dtype: torch.dtype, rule: AdamwRule) -> None:
    torch.ops.dcx_native.adamw_slices(lines, dtype, *rule)


_STEPS = SliceSteps(READER, _DTYPES, _sgd, _adamw)

sgd_slices_ = _STEPS.sgd_slices_
adamw_slices_ = _STEPS.adamw_slices_
