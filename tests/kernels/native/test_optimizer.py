"""Optimizer steps on slices in one native call: torch's fused ones within the tolerances."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dcx_kernels import ChannelSet
from dcx_kernels.kernels.native import load
from dcx_kernels.kernels.reference import slices as reference
from dcx_kernels.kernels.slices import Slice
from optimizer_cases import (
    ADAMW,
    ADAMW_DEFAULTS,
    SGD,
    SGD_DEFAULTS,
    check_buffers_without_momentum,
    check_channels_last,
    check_mismatch,
    check_mixed_dtypes,
    check_network,
    check_no_decay,
    check_no_parameters,
    check_rest,
    check_step,
    check_step_counts_elsewhere,
    check_tensor_learning_rate,
    note_reference,
)
from tolerances import assert_exact, assert_reruns_equal

if (lacking := load("cpu")) is not None:
    pytest.skip(f"the native library of CPUs is {lacking}", allow_module_level=True)

from dcx_kernels.kernels.native import cpu
from dcx_kernels.kernels.native.cpu import optimizer as kernels

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", SGD)
def test_sgd_steps(variant: str, dtype: torch.dtype) -> None:
    check_step(kernels, dtype, {**SGD_DEFAULTS, **SGD[variant]})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ADAMW)
def test_adamw_steps(variant: str, dtype: torch.dtype) -> None:
    check_step(kernels, dtype, {**ADAMW_DEFAULTS, **ADAMW[variant]})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return the dtype of each call of the library, and how many parameters the reference got."""
    made: list[object] = []
    note_reference(monkeypatch, made)

    def noted(native: Any) -> Any:
        def call(*args: Any) -> None:
            made.append(args[1])
            native(*args)

        return call

    for name in ("sgd_slices", "adamw_slices"):
        monkeypatch.setattr(torch.ops.dcx_native, name, noted(getattr(torch.ops.dcx_native, name)))
    return made


def test_one_call_a_dtype(calls: list[object]) -> None:
    check_mixed_dtypes(kernels, calls, [torch.float32, torch.bfloat16, torch.float64])


def test_weights_of_channels_last_networks(calls: list[object]) -> None:
    check_channels_last(kernels, calls)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_tensor_learning_rate_and_nothing(name: str, calls: list[object]) -> None:
    check_tensor_learning_rate(kernels, name, calls)
    check_no_parameters(kernels, name)


def test_numbers_that_are_not_on_the_host(
    monkeypatch: pytest.MonkeyPatch, calls: list[object]
) -> None:
    check_step_counts_elsewhere(kernels, monkeypatch, calls)


def test_a_step_without_decay_does_not_spread_infinities() -> None:
    check_no_decay(kernels)


def test_strided_tensors_among_flat_ones(calls: list[object]) -> None:
    check_rest(kernels, calls)


def test_buffers_without_momentum_stay() -> None:
    check_buffers_without_momentum(kernels)


def test_what_does_not_match_is_not_written_by_address(
    monkeypatch: pytest.MonkeyPatch, calls: list[object]
) -> None:
    check_mismatch(kernels, monkeypatch, calls)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_network_trains_as_with_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_network(cpu, name, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_threads_change_no_bit(name: str, dtype: torch.dtype) -> None:
    """Lengths that no vector divides, and boundaries of threads within a slice."""
    some = {size: ChannelSet(torch.randperm(size)[: size // 2], size).indices for size in (90, 301)}
    slices = [
        Slice((301, 90, 3, 3), some[301], some[90]),
        Slice((301, 301), None, some[301]),
        Slice((301, 90, 5), some[301]),
        None,
    ]
    shapes = [(30007,) if slice_ is None else slice_.shape for slice_ in slices]
    params = [torch.randn(shape).to(dtype) for shape in shapes]
    states = [[torch.rand(shape).to(dtype) for shape in shapes] for _ in range(3)]
    grads = [torch.randn_like(part) for part in reference.gather_slices(params, slices)]
    before = torch.get_num_threads()

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        full, *own = ([tensor.clone() for tensor in some] for some in (params, *states))
        if name == "sgd":
            settings = {**SGD_DEFAULTS, **SGD["nesterov"]}
            kernels.sgd_slices_(full, grads, own[0], slices, [False] * 4, **settings)
        else:
            steps = [torch.tensor(3.0) for _ in full]
            kernels.adamw_slices_(full, grads, *own, steps, slices, **ADAMW_DEFAULTS)
        return [tensor for tensors in (full, *own) for tensor in tensors]

    try:
        counts = iter((1, 2, 2))
        assert_reruns_equal(lambda: run(next(counts)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_numbers_of_16_bits_are_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
    """Every number, at the ties between them too: p - 1 * (p - value) for a p of 0."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    settings = {**SGD_DEFAULTS, "lr": -1.0}
    zeros = torch.zeros_like(every)
    kernels.sgd_slices_([zeros], [every], None, [None], [False], **settings)
    assert_exact(zeros[~every.isnan()], (0 + every.float()).to(dtype)[~every.isnan()])
    assert zeros[every.isnan()].isnan().all()
    # halves of a number have bits that it has not, where they are subnormal; sums of two, others
    for scale in (0.5, 0.75, 1.0 + 2.0**-9, 3.0):
        result = torch.zeros_like(every)
        kernels.sgd_slices_([result], [every], None, [None], [False], **{**settings, "lr": -scale})
        finite = ~every.isnan()
        assert_exact(result[finite], (0 + every.float() * scale).to(dtype)[finite], str(scale))


@pytest.mark.parametrize(
    ("table", "dtype", "message"),
    [
        (torch.zeros(1, 13, dtype=torch.int64), torch.float32, "expected 14 columns, got 13"),
        (torch.zeros(1, 14), torch.float32, "expected a contiguous table of int64"),
        (torch.zeros(1, 14, dtype=torch.int64), torch.int32, "expected a floating-point dtype"),
    ],
)
def test_wrong_tables_are_refused(table: Tensor, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dcx_native.sgd_slices(table, dtype, True, 0.1, 0.9, 1.0, 0.0, False, False)
