"""Optimizer steps on the active slices of all parameters: what backends that read tables share.

The full parameter and its full state are read and written at the slice only; the rest of them is
never touched. Only the gradient is packed. Arithmetic is fp32, or float64 in its own where a
backend has it, in the order of torch's fused kernels. Parameters of one launch have one dtype.

What the kernels do not know goes to the reference: a dtype, sparse gradients, tensors that do not
lie flat, a learning rate or a step count that is not on the host.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcx_kernels.kernels.reference import slices as reference
from dcx_kernels.kernels.slice_table import SliceTable, TableReader
from dcx_kernels.kernels.slices import Scratch, Slice

__all__ = ["AdamwRule", "SgdRule", "SliceSteps"]


class SgdRule(NamedTuple):
    """One step of SGD for all parameters, in the order of the libraries' operators.

    Columns of its own are the addresses of the parameter and the gradient; with momentum, that of
    the buffer, and whether it is fresh.
    """

    with_momentum: bool
    lr: float
    momentum: float
    undamped: float
    weight_decay: float
    nesterov: bool
    maximize: bool


class AdamwRule(NamedTuple):
    """One step of AdamW for all parameters, in the order of the libraries' operators.

    Columns of its own are the addresses of the parameter, the gradient and both moments; float64
    bits of the step size and of the second moment's correction, as step counts differ: of layers
    that join later; with amsgrad, the address of the maximum.
    """

    amsgrad: bool
    decay: float
    beta1: float
    beta2: float
    eps: float
    maximize: bool


@dataclass(frozen=True)
class SliceSteps:
    """The optimizers of a backend.

    Args:
        reader: what its kernels read.
        dtypes: of the parameters that they update.
        sgd, adamw: launch one: (lines, blocks, dtype, rule).
    """

    reader: TableReader
    dtypes: Collection[torch.dtype]
    sgd: Callable[[Tensor, int, torch.dtype, SgdRule], None]
    adamw: Callable[[Tensor, int, torch.dtype, AdamwRule], None]

    def sgd_slices_(
        self,
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
        if momentum == 0:
            buffers = None  # torch leaves them alone
        states = [[] for _ in params] if buffers is None else [[buffer] for buffer in buffers]
        ours, rest = self._split(params, grads, states, slices, lr)
        if rest:
            reference.sgd_slices_(
                _pick(params, rest), _pick(grads, rest), buffers and _pick(buffers, rest),
                _pick(slices, rest), _pick(fresh, rest), leaves=leaves and _pick(leaves, rest),
                lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay,
                nesterov=nesterov, maximize=maximize, scratch=scratch,
            )  # fmt: skip
        if not ours:
            return
        rule = SgdRule(
            buffers is not None, float(lr), momentum, 1.0 - dampening, weight_decay, nesterov,
            maximize,
        )  # fmt: skip

        def own(index: int) -> tuple[int, ...]:
            memory = params[index].data_ptr(), grads[index].data_ptr()
            if buffers is None:
                return memory
            return *memory, buffers[index].data_ptr(), fresh[index]

        for lines, blocks, dtype in self._tables(ours, params, slices, own):
            self.sgd(lines, blocks, dtype, rule)
        _note_writes(ours, params, states)

    def adamw_slices_(
        self,
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
        ours, rest = self._split(params, grads, states, slices, lr, *steps)
        if rest:
            reference.adamw_slices_(
                _pick(params, rest), _pick(grads, rest), _pick(exp_avgs, rest),
                _pick(exp_avg_sqs, rest), max_exp_avg_sqs and _pick(max_exp_avg_sqs, rest),
                _pick(steps, rest), _pick(slices, rest), leaves=leaves and _pick(leaves, rest),
                lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize,
                scratch=scratch,
            )  # fmt: skip
        if not ours:
            return
        rate, beta1, beta2 = float(lr), float(betas[0]), float(betas[1])
        rule = AdamwRule(
            max_exp_avg_sqs is not None, rate * weight_decay, beta1, beta2, eps, maximize
        )
        counts = _pick(steps, ours)
        torch._foreach_add_(counts, 1)
        taken = dict(zip(ours, torch.stack(counts).tolist(), strict=True))

        @cache
        def corrections(step: float) -> tuple[int, int]:
            return _bits(rate / (1.0 - beta1**step)), _bits(math.sqrt(1.0 - beta2**step))

        def own(index: int) -> tuple[int, ...]:
            first, second, *largest = (state.data_ptr() for state in states[index])
            memory = params[index].data_ptr(), grads[index].data_ptr(), first, second
            return *memory, *corrections(taken[index]), *largest

        for lines, blocks, dtype in self._tables(ours, params, slices, own):
            self.adamw(lines, blocks, dtype, rule)
        _note_writes(ours, params, states)

    def _split(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[Sequence[Tensor]],
        slices: Sequence[Slice | None],
        *scalars: float | Tensor,
    ) -> tuple[list[int], list[int]]:
        """Return the numbers of the parameters that the kernels update, and of those they do not.

        Args:
            scalars: what the host reads: a number on a device would have to be waited for.
        """
        readable = all(not isinstance(scalar, Tensor) or scalar.is_cpu for scalar in scalars)
        ours: list[int] = []
        rest: list[int] = []
        for index, (param, grad, state, slice_) in enumerate(
            zip(params, grads, states, slices, strict=True)
        ):
            known = readable and self._knows(param, grad, state, slice_)
            (ours if known else rest).append(index)
        return ours, rest

    def _knows(
        self, param: Tensor, grad: Tensor, state: Sequence[Tensor], slice_: Slice | None
    ) -> bool:
        dtype, shape, device = param.dtype, param.shape, param.device
        if dtype not in self.dtypes or not self.reader.fits(param, slice_):
            return False
        if grad.shape != (shape if slice_ is None else slice_.packed_shape):
            return False
        flat = param.is_contiguous()
        for tensor in (grad, *state):
            if tensor.dtype is not dtype or tensor.device != device:
                return False
            if tensor.layout is not torch.strided or (tensor is not grad and tensor.shape != shape):
                return False
            flat = flat and tensor.is_contiguous()
        last = torch.channels_last
        return flat or (
            slice_ is None
            and all(tensor.is_contiguous(memory_format=last) for tensor in (param, grad, *state))
        )

    def _tables(
        self,
        ours: Iterable[int],
        params: Sequence[Tensor],
        slices: Sequence[Slice | None],
        own: Callable[[int], tuple[int, ...]],
    ) -> Iterator[tuple[Tensor, int, torch.dtype]]:
        """Yield the lines and the number of blocks, for each device and dtype."""
        tables: dict[tuple[torch.device, torch.dtype], SliceTable] = {}
        for index in ours:
            param, numbers = params[index], own(index)
            key = param.device, param.dtype
            table = tables.get(key)
            if table is None:
                table = tables[key] = self.reader.table(len(numbers))
            table.add(slices[index], param, *numbers)
        for (device, dtype), table in tables.items():
            if table.blocks:
                yield table.on(device), table.blocks, dtype


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
