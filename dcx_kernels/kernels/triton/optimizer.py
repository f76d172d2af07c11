"""Optimizer steps on the active slices of all parameters, in one launch.

The full parameter and its full state are read and written at the slice only; the rest of them is
never touched. Only the gradient is packed. Arithmetic is fp32, in the order of torch's fused
kernels. Parameters of one launch have one dtype, see `slices`.

What the kernels do not know goes to the reference: float64, sparse gradients, tensors that do not
lie flat, a learning rate in a tensor.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from dcx_kernels.kernels.reference import slices as reference
from dcx_kernels.kernels.slices import Scratch, Slice
from dcx_kernels.kernels.triton._launch import kernel, on, serves
from dcx_kernels.kernels.triton._math import cast
from dcx_kernels.kernels.triton.slices import (
    BLOCK,
    COMMON,
    MOST,
    Table,
    elements,
    find_slice,
    offsets,
)

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


def sgd_slices_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor] | None,
    slices: Sequence[Slice | None],
    fresh: Sequence[bool],
    *,
    leaves: Sequence[Tensor | None] | None = None,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    scratch: Scratch | None = None,
) -> None:
    """Update parameters as `torch.optim.SGD` does: see `reference.slices.sgd_slices_`."""
    states = [[] for _ in params] if buffers is None else [[buffer] for buffer in buffers]
    ours, rest = _split(params, grads, states, slices, lr)
    if rest:
        reference.sgd_slices_(
            _pick(params, rest), _pick(grads, rest), buffers and _pick(buffers, rest),
            _pick(slices, rest), _pick(fresh, rest), leaves=leaves and _pick(leaves, rest), lr=lr,
            momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov,
            maximize=maximize, scratch=scratch,
        )  # fmt: skip

    def own(index: int) -> list[int]:
        memory = [params[index], grads[index], *states[index]]
        return [t.data_ptr() for t in memory] + [int(fresh[index])] * len(states[index])

    for table, like in _tables(ours, params, slices, own):
        with on(like):
            _sgd_slices_kernel[(table.blocks,)](
                table.to(like.device), len(table), float(lr), float(momentum), 1.0 - dampening,
                float(weight_decay), -1.0 if maximize else 1.0, MOMENTUM=buffers is not None,
                NESTEROV=nesterov and buffers is not None, DTYPE=_DTYPES[like.dtype],
                COLUMNS=table.columns, BLOCK=BLOCK,
            )  # fmt: skip
    _note_writes(ours, params, states)


def adamw_slices_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor] | None,
    steps: Sequence[Tensor],
    slices: Sequence[Slice | None],
    *,
    leaves: Sequence[Tensor | None] | None = None,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
    scratch: Scratch | None = None,
) -> None:
    """Update parameters as `torch.optim.AdamW` does: see `reference.slices.adamw_slices_`."""
    moments = [exp_avgs, exp_avg_sqs] + ([] if max_exp_avg_sqs is None else [max_exp_avg_sqs])
    states = [list(state) for state in zip(*moments, strict=True)]
    # a step count that is not on the host would have to be waited for
    counted = lr if all(step.device.type == "cpu" for step in steps) else steps[0]
    ours, rest = _split(params, grads, states, slices, counted)
    if rest:
        reference.adamw_slices_(
            _pick(params, rest), _pick(grads, rest), _pick(exp_avgs, rest),
            _pick(exp_avg_sqs, rest), max_exp_avg_sqs and _pick(max_exp_avg_sqs, rest),
            _pick(steps, rest), _pick(slices, rest), leaves=leaves and _pick(leaves, rest), lr=lr,
            betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize, scratch=scratch,
        )  # fmt: skip
    if not ours:
        return
    torch._foreach_add_(_pick(steps, ours), 1)
    beta1, beta2 = (float(beta) for beta in betas)

    @cache
    def corrections(step: float) -> list[int]:
        size = float(lr) / (1.0 - beta1**step)
        return [_bits(size), _bits(math.sqrt(1.0 - beta2**step))]

    def own(index: int) -> list[int]:
        first, second, *largest = (t.data_ptr() for t in states[index])
        memory = [params[index].data_ptr(), grads[index].data_ptr(), first, second]
        return [*memory, *corrections(float(steps[index])), *largest]

    for table, like in _tables(ours, params, slices, own):
        with on(like):
            _adamw_slices_kernel[(table.blocks,)](
                table.to(like.device), len(table), float(lr) * weight_decay, beta1, 1.0 - beta1,
                beta2, 1.0 - beta2, float(eps), -1.0 if maximize else 1.0,
                AMSGRAD=max_exp_avg_sqs is not None, DTYPE=_DTYPES[like.dtype],
                COLUMNS=table.columns, BLOCK=BLOCK,
            )  # fmt: skip
    _note_writes(ours, params, states)


def _split(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    slices: Sequence[Slice | None],
    scalar: float | Tensor,
) -> tuple[list[int], list[int]]:
    """Return the numbers of the parameters that the kernels update, and of those they do not."""
    ours: list[int] = []
    rest: list[int] = []
    for index, (param, grad, state, slice_) in enumerate(
        zip(params, grads, states, slices, strict=True)
    ):
        known = not isinstance(scalar, Tensor) and _knows(param, [grad, *state], slice_)
        (ours if known else rest).append(index)
    return ours, rest


def _knows(param: Tensor, others: Sequence[Tensor], slice_: Slice | None) -> bool:
    if param.dtype not in _DTYPES or not serves(param.device) or param.numel() >= MOST:
        return False
    for other in others:
        alike = other.dtype == param.dtype and other.device == param.device
        if not alike or other.layout is not torch.strided:
            return False
    if all(tensor.is_contiguous() for tensor in (param, *others)):
        return True
    last = torch.channels_last
    return slice_ is None and all(t.is_contiguous(memory_format=last) for t in (param, *others))


def _tables(
    ours: Iterable[int],
    params: Sequence[Tensor],
    slices: Sequence[Slice | None],
    own: Callable[[int], list[int]],
) -> list[tuple[Table, Tensor]]:
    """Return a table for each device and dtype, with a parameter that is like the others in it."""
    tables: dict[tuple[torch.device, torch.dtype], tuple[Table, Tensor]] = {}
    for index in ours:
        param, numbers = params[index], own(index)
        key = (param.device, param.dtype)
        if key not in tables:
            tables[key] = Table(len(numbers)), param
        tables[key][0].add(slices[index], param, *numbers)
    return [(table, like) for table, like in tables.values() if table.blocks]


def _note_writes(
    ours: Iterable[int], params: Sequence[Tensor], states: Sequence[Sequence[Tensor]]
) -> None:
    """Tell autograd, and with it whoever keeps copies, what was written through addresses."""
    torch.autograd.graph.increment_version(
        [tensor for index in ours for tensor in (params[index], *states[index])]
    )


def _pick(values: Sequence[Any], indices: Sequence[int]) -> list[Any]:
    return [values[index] for index in indices]


def _bits(number: float) -> int:
    """Return a number's float64 bits: the table holds integers."""
    bits: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return bits
