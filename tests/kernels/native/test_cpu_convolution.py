"""Weight gradients over small images: equal to the reference, and really products of matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dcx_kernels.kernels import reference
from dcx_kernels.kernels.native import load
from tolerances import assert_close_to_float64, assert_exact, assert_reruns_equal

_LACKING = load("cpu")
if _LACKING is not None:
    pytest.skip(f"the native library of CPUs is not built: {_LACKING}", allow_module_level=True)

from dcx_kernels.kernels.native.cpu import convolution as native  # noqa: E402


class Case(NamedTuple):
    """Sizes of a convolution that a product computes."""

    c: int
    k: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    batch: int = 3

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        return list(self.stride), list(self.padding), list(self.dilation)


CASES = {
    "2x2": Case(33, 47, (2, 2)),
    "batch-1": Case(63, 32, (2, 2), batch=1),
    "one-pixel": Case(32, 40, (1, 1)),
    "stride": Case(40, 33, (3, 4), stride=(2, 3)),
    "uneven": Case(35, 32, (5, 3), kernel=(3, 2), padding=(0, 1), stride=(2, 2)),
    "dilation": Case(32, 32, (5, 4), dilation=(2, 2), padding=(1, 1), stride=(1, 1)),
    "no-padding": Case(32, 33, (4, 4), padding=(0, 0)),
}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def _tensors(case: Case, memory_format: torch.memory_format) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(case.batch, case.c, *case.size).contiguous(memory_format=memory_format)
    weight = torch.randn(case.k, case.c, *case.kernel)
    dy = torch.randn_like(torch.conv2d(x, weight, None, *case.geometry))
    return x, weight, dy.contiguous(memory_format=memory_format)


@pytest.fixture
def products_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make what falls to the reference an error."""

    def refuse(*args: object) -> Tensor:
        raise AssertionError("expected a product of matrices, got the reference")

    monkeypatch.setattr(native.reference, "channel_conv2d_wgrad", refuse)


@pytest.mark.usefixtures("products_only")
@pytest.mark.parametrize("chunk", [1 << 20, 1500])
@pytest.mark.parametrize("memory_format", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_product_equals_weight_gradient(
    case: Case, memory_format: torch.memory_format, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_CHUNK", chunk)
    x, weight, dy = _tensors(case, memory_format)
    dw = native.channel_conv2d_wgrad(dy, x, case.kernel, *case.geometry, 1)
    grads = [_wgrad(dy.to(t), x.to(t), weight.to(t), case) for t in (torch.float32, torch.float64)]
    assert_close_to_float64(dw, *grads, "dw")
    assert dw.is_contiguous()


def _wgrad(dy: Tensor, x: Tensor, weight: Tensor, case: Case) -> Tensor:
    weight = weight.requires_grad_()
    (dw,) = torch.autograd.grad(torch.conv2d(x, weight, None, *case.geometry), weight, dy)
    return dw


@pytest.mark.usefixtures("products_only")
def test_reruns_are_equal() -> None:
    case = Case(70, 61, (4, 4), batch=9)
    x, _, dy = _tensors(case, torch.channels_last)
    assert_reruns_equal(lambda: native.channel_conv2d_wgrad(dy, x, case.kernel, *case.geometry, 1))


@pytest.mark.parametrize(
    ("shape", "k", "kernel", "groups", "dtype"),
    [
        ((2, 64, 9, 9), 64, (3, 3), 1, torch.float32),  # large
        ((2, 31, 2, 2), 64, (3, 3), 1, torch.float32),  # narrow
        ((2, 64, 2, 2), 31, (3, 3), 1, torch.float32),
        ((2, 64, 2, 2), 64, (1, 1), 1, torch.float32),
        ((2, 64, 2, 2), 64, (3, 3), 2, torch.float32),
        ((2, 64, 2, 2), 64, (3, 3), 1, torch.bfloat16),
        ((2, 64, 2, 2), 64, (5, 5), 1, torch.float32),
        ((0, 64, 2, 2), 64, (3, 3), 1, torch.float32),
    ],
)
def test_everything_else_is_the_reference(
    shape: Sequence[int],
    k: int,
    kernel: tuple[int, int],
    groups: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And not a product that happens to give the same bits."""
    monkeypatch.setattr(native, "_patches", None)
    x = torch.randn(*shape, dtype=dtype)
    weight = torch.randn(k, shape[1] // groups, *kernel, dtype=dtype)
    geometry = [1, 1], [kernel[0] // 2] * 2, [1, 1]
    y = torch.conv2d(x, weight, None, *geometry, groups)
    dw = native.channel_conv2d_wgrad(y, x, kernel, *geometry, groups)
    assert_exact(dw, reference.channel_conv2d_wgrad(y, x, kernel, *geometry, groups))


def test_no_pixels_are_no_product() -> None:
    assert not native._wins(torch.zeros(2, 64, 2, 2), 64, (3, 3), (0, 2), 1)
