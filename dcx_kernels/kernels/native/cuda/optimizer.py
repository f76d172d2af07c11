"""Optimizer steps on the active slices of all parameters, in one launch: see `kernels.slice_steps`.

Arithmetic is fp32; float64 is the reference's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcx_kernels.kernels.native.cuda.slices import READER
from dcx_kernels.kernels.slice_steps import AdamwRule, SgdRule, SliceSteps

__all__ = ["STEPS", "adamw_slices_", "sgd_slices_"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _sgd(lines: Tensor, blocks: int, dtype: torch.dtype, rule: SgdRule) -> None:
    torch.ops.dcx_native.sgd_slice_blocks(lines, blocks, dtype, *rule)


def _adamw(lines: Tensor, blocks: int, dtype: torch.dtype, rule: AdamwRule) -> None:
    torch.ops.dcx_native.adamw_slice_blocks(lines, blocks, dtype, *rule)


STEPS = SliceSteps(READER, _DTYPES, _sgd, _adamw)

sgd_slices_ = STEPS.sgd_slices_
adamw_slices_ = STEPS.adamw_slices_
