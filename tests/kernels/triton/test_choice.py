"""Which implementation convolves, what forces another one, and that all of them agree."""

from __future__ import annotations

import pytest
import torch

import dcx_kernels.kernels.triton as kernels
from dcx_kernels.kernels import reference
from dcx_kernels.kernels.triton.choice import IMPLEMENTATIONS, SOURCE, implementation
from tolerances import assert_exact

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DCX_CONV", raising=False)


def test_the_rule_until_a_gpu_is_measured() -> None:
    assert "not measured" in SOURCE
    for which in ("fwd", "dgrad", "wgrad"):
        assert implementation(which, BF16, 64, 32, 1) == "library"
        assert implementation(which, BF16, 63, 32, 1) == "own"
        assert implementation(which, BF16, 64, 30, 1) == "own"
        assert implementation(which, BF16, 60, 60, 1) == "own"
        assert implementation(which, FP32, 60, 60, 1) == "library"  # 4 elements are 16 bytes
        assert implementation(which, BF16, 17, 17, 17) == "library"  # depthwise
        assert implementation(which, BF16, 66, 66, 2) == "own"  # 33 channels a group
        assert implementation(which, torch.float64, 63, 63, 1) == "library"


def test_the_environment_overrides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in IMPLEMENTATIONS:
        monkeypatch.setenv("DCX_CONV", name)
        assert implementation("fwd", BF16, 64, 63, 1) == name
    monkeypatch.setenv("DCX_CONV", "abacus")
    with pytest.raises(ValueError, match=r"expected DCX_CONV to be one of .*, got 'abacus'"):
        implementation("fwd", BF16, 64, 64, 1)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("lists", [True, False], ids=["full", "packed"])
@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format], ids=str)
def test_all_compute_the_same(
    name: str,
    lists: bool,
    form: torch.memory_format,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DCX_CONV", name)
    x = torch.randint(-3, 4, (2, 3, 5, 4), device=device).to(FP32).contiguous(memory_format=form)
    weight = torch.randint(-3, 4, (6, 5, 3, 3), device=device).to(FP32)
    bias = torch.randint(-3, 4, (6,), device=device).to(FP32)
    in_idx, out_idx = (torch.tensor(i, device=device) for i in ([0, 2, 3], [0, 1, 3, 4, 5]))
    if not lists:
        weight, bias = weight[out_idx][:, in_idx], bias[out_idx]
        in_idx = out_idx = None
    window = ([2, 1], [1, 1], [1, 1])
    y = kernels.channel_conv2d_fwd(x, weight, bias, in_idx, out_idx, *window, 1, 1)
    assert_exact(y, reference.channel_conv2d_fwd(x, weight, bias, in_idx, out_idx, *window, 1, 1))
    assert y.is_contiguous(memory_format=form)
    dx = kernels.channel_conv2d_dgrad(y, x, weight, in_idx, out_idx, *window, 1, 1)
    assert_exact(dx, reference.channel_conv2d_dgrad(y, x, weight, in_idx, out_idx, *window, 1, 1))
    dw = kernels.channel_conv2d_wgrad(y, x, [3, 3], *window, 1)
    assert_exact(dw, reference.channel_conv2d_wgrad(y, x, [3, 3], *window, 1))


def test_operands_of_different_types_are_refused_as_in_torch(device: torch.device) -> None:
    x, weight = torch.randn(1, 3, 4, 4, device=device), torch.randn(3, 3, 1, 1).to(device, BF16)
    with pytest.raises(RuntimeError, match=r"same|type"):
        kernels.channel_conv2d_fwd(x, weight, None, None, None, [1, 1], [0, 0], [1, 1], 1, 1)
