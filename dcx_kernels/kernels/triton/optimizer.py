"""Optimizer steps on the active slices of all parameters, in one launch: see `kernels.slice_steps`.

Arithmetic is fp32; float64 is the reference's.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from dcx_kernels.kernels.slice_steps import AdamwRule, SgdRule, SliceSteps
from dcx_kernels.kernels.slice_table import COMMON
from dcx_kernels.kernels.triton._launch import kernel, on
from dcx_kernels.kernels.triton._math import cast
from dcx_kernels.kernels.triton.slices import BLOCK, READER, elements, find_slice, offsets

__all__ = ["adamw_slices_", "sgd_slices_"]

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

_COMMON = tl.constexpr(COMMON)


@kernel()
def _sgd_slices_kernel(
    table_ptr,
    count,
    lr,
    momentum,
    undamped,
    weight_decay,
    sign,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    DTYPE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    line_ptr = find_slice(table_ptr, count, COLUMNS)
    element, inside = elements(line_ptr, BLOCK)
    place = offsets(line_ptr, element, inside)
    own_ptr = line_ptr + _COMMON
    param_ptr = tl.load(own_ptr).to(tl.pointer_type(DTYPE)) + place
    grad_ptr = tl.load(own_ptr + 1).to(tl.pointer_type(DTYPE)) + element
    param = tl.load(param_ptr, mask=inside, other=0.0).to(tl.float32)
    step = tl.load(grad_ptr, mask=inside, other=0.0).to(tl.float32) * sign
    if weight_decay != 0:  # not 0 * inf
        step += weight_decay * param
    if MOMENTUM:
        buffer_ptr = tl.load(own_ptr + 2).to(tl.pointer_type(DTYPE)) + place
        fresh = tl.load(own_ptr + 3) != 0
        buffer = tl.load(buffer_ptr, mask=inside, other=0.0).to(tl.float32)
        buffer = tl.where(fresh, step, momentum * buffer + undamped * step)
        tl.store(buffer_ptr, cast(buffer, DTYPE), mask=inside)
        if NESTEROV:
            step += momentum * buffer
        else:
            step = buffer
    tl.store(param_ptr, cast(param - lr * step, DTYPE), mask=inside)


@kernel()
def _adamw_slices_kernel(
    table_ptr,
    count,
    decay,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    sign,
    AMSGRAD: tl.constexpr,
    DTYPE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    line_ptr = find_slice(table_ptr, count, COLUMNS)
    element, inside = elements(line_ptr, BLOCK)
    place = offsets(line_ptr, element, inside)
    own_ptr = line_ptr + _COMMON
    param_ptr = tl.load(own_ptr).to(tl.pointer_type(DTYPE)) + place
    grad_ptr = tl.load(own_ptr + 1).to(tl.pointer_type(DTYPE)) + element
    first_ptr = tl.load(own_ptr + 2).to(tl.pointer_type(DTYPE)) + place
    second_ptr = tl.load(own_ptr + 3).to(tl.pointer_type(DTYPE)) + place
    # step counts differ: of layers that join later
    step_size = tl.load(own_ptr + 4).to(tl.float64, bitcast=True).to(tl.float32)
    correction = tl.load(own_ptr + 5).to(tl.float64, bitcast=True).to(tl.float32)
    param = tl.load(param_ptr, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr, mask=inside, other=0.0).to(tl.float32) * sign
    first = tl.load(first_ptr, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(second_ptr, mask=inside, other=0.0).to(tl.float32)
    if decay != 0:  # not 0 * inf
        param -= decay * param
    first = beta1 * first + rest1 * grad
    second = beta2 * second + rest2 * (grad * grad)
    tl.store(first_ptr, cast(first, DTYPE), mask=inside)
    tl.store(second_ptr, cast(second, DTYPE), mask=inside)
    if AMSGRAD:
        largest_ptr = tl.load(own_ptr + 6).to(tl.pointer_type(DTYPE)) + place
        largest = tl.load(largest_ptr, mask=inside, other=0.0).to(tl.float32)
        second = tl.maximum(largest, second)
        tl.store(largest_ptr, cast(second, DTYPE), mask=inside)
    # rounded as torch rounds: memory is what takes the time
    denominator = tl.div_rn(tl.sqrt_rn(second), correction) + eps
    param -= tl.div_rn(step_size * first, denominator)
    tl.store(param_ptr, cast(param, DTYPE), mask=inside)


def _sgd(lines: Tensor, blocks: int, dtype: torch.dtype, rule: SgdRule) -> None:
    count, columns = lines.shape
    with on(lines):
        _sgd_slices_kernel[(blocks,)](
            lines, count, rule.lr, float(rule.momentum), rule.undamped, float(rule.weight_decay),
            -1.0 if rule.maximize else 1.0, MOMENTUM=rule.with_momentum,
            NESTEROV=rule.nesterov and rule.with_momentum, DTYPE=_DTYPES[dtype], COLUMNS=columns,
            BLOCK=BLOCK,
        )  # fmt: skip


def _adamw(lines: Tensor, blocks: int, dtype: torch.dtype, rule: AdamwRule) -> None:
    count, columns = lines.shape
    with on(lines):
        _adamw_slices_kernel[(blocks,)](
            lines, count, rule.decay, rule.beta1, 1.0 - rule.beta1, rule.beta2, 1.0 - rule.beta2,
            float(rule.eps), -1.0 if rule.maximize else 1.0, AMSGRAD=rule.amsgrad,
            DTYPE=_DTYPES[dtype], COLUMNS=columns, BLOCK=BLOCK,
        )  # fmt: skip


_STEPS = SliceSteps(READER, _DTYPES, _sgd, _adamw)

sgd_slices_ = _STEPS.sgd_slices_
adamw_slices_ = _STEPS.adamw_slices_
