"""Optimizer steps on slices in one launch: torch's fused ones within the tolerances."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dcx_kernels.kernels import triton
from dcx_kernels.kernels.triton import optimizer as kernels
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

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", SGD)
def test_sgd_steps(variant: str, dtype: torch.dtype, device: torch.device) -> None:
    check_step(kernels, dtype, {**SGD_DEFAULTS, **SGD[variant]}, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ADAMW)
def test_adamw_steps(variant: str, dtype: torch.dtype, device: torch.device) -> None:
    check_step(kernels, dtype, {**ADAMW_DEFAULTS, **ADAMW[variant]}, device)


class _Launches:
    """Stand for a kernel and note the dtype of each launch."""

    def __init__(self, kernel: Any, calls: list[object]) -> None:
        self.kernel, self.calls = kernel, calls
        self.dtypes = {own: dtype for dtype, own in kernels._DTYPES.items()}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **flags: Any) -> None:
            self.calls.append(self.dtypes[flags["DTYPE"]])
            self.kernel[grid](*args, **flags)

        return launch


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return the dtype of each launch, and how many parameters the reference got."""
    made: list[object] = []
    note_reference(monkeypatch, made)
    for name in ("_sgd_slices_kernel", "_adamw_slices_kernel"):
        monkeypatch.setattr(kernels, name, _Launches(getattr(kernels, name), made))
    return made


def test_one_launch_a_dtype(device: torch.device, calls: list[object]) -> None:
    """What the kernel does not know is updated as well, with the others in one call."""
    check_mixed_dtypes(kernels, calls, [6, torch.float32, torch.bfloat16], device)


def test_weights_of_channels_last_networks(device: torch.device, calls: list[object]) -> None:
    check_channels_last(kernels, calls, device)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_tensor_learning_rate_and_nothing(
    name: str, device: torch.device, calls: list[object]
) -> None:
    check_tensor_learning_rate(kernels, name, calls, device)
    check_no_parameters(kernels, name, device)


def test_numbers_that_are_not_on_the_host(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, calls: list[object]
) -> None:
    check_step_counts_elsewhere(kernels, monkeypatch, calls, device)


def test_a_step_without_decay_does_not_spread_infinities(device: torch.device) -> None:
    check_no_decay(kernels, device)


def test_strided_tensors_among_flat_ones(device: torch.device, calls: list[object]) -> None:
    check_rest(kernels, calls, device)


def test_buffers_without_momentum_stay(device: torch.device) -> None:
    check_buffers_without_momentum(kernels, device)


def test_what_does_not_match_is_not_written_by_address(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, calls: list[object]
) -> None:
    check_mismatch(kernels, monkeypatch, calls, device)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_network_trains_as_with_the_reference(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_network(triton, name, monkeypatch, device)
