"""The saliency that layers measure, against both definitions written out, and DCX_CHECK."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcx_kernels import ChannelSet, SparseChannelBatchNorm2d, SparseChannelConv2d
from dcx_kernels.nn._saliency import SaliencyMeter
from tolerances import assert_gradients_close

ACTIVE = ChannelSet([0, 2, 5], 7)
IN = ChannelSet([1, 3], 4)


def _definition(h: Tensor, reduction: str) -> Tensor:
    product = h.grad * h.detach()
    if reduction == "batch":
        return product.mean((0, 2, 3)).abs()
    return product.mean((2, 3)).abs().mean(0)


def _same(got: Tensor, wanted: Tensor) -> None:
    assert_gradients_close({"saliency": got}, {"saliency": wanted})


def _norm() -> SparseChannelBatchNorm2d:
    norm = SparseChannelBatchNorm2d(7, relu=True).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    return norm.set_active(ACTIVE)


@pytest.mark.parametrize("reduction", ["batch", "sample"])
def test_norm_measures_the_definition(reduction: str) -> None:
    norm = _norm()
    norm.saliency_reduction = reduction
    x, upstream = torch.randn(2, 3, 3, 4, 5, dtype=torch.float64).unbind()
    h = F.batch_norm(x, None, None, norm.weight[[0, 2, 5]], norm.bias[[0, 2, 5]], training=True)
    h.retain_grad()
    h.relu().backward(upstream)
    assert norm.saliency_meter.read(reduction) is None
    norm(x).backward(upstream)
    _same(norm.saliency_meter.read(reduction), _definition(h, reduction))


@pytest.mark.parametrize("reduction", ["batch", "sample"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"padding": "same", "bias": False},
        {"dilation": 2},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": "same", "padding_mode": "circular"},
        {"padding": "valid", "stride": (1, 2)},
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()).replace(" ", "") or "defaults",
)
def test_conv_measures_the_definition(options: dict[str, object], reduction: str) -> None:
    conv = SparseChannelConv2d(4, 7, 3, **options, compact_output=True).double()
    conv.set_active(ACTIVE, IN)
    conv.saliency_reduction = reduction
    x = torch.randn(3, 4, 7, 6).double()
    y = conv(x)
    h = y.detach().requires_grad_()
    upstream = torch.randn_like(y)
    h.relu().backward(upstream)
    y.relu().backward(upstream)
    _same(conv.saliency_meter.read(reduction), _definition(h, reduction))


def test_meter_sums_backward_passes_and_resets() -> None:
    norm = _norm()
    norm.saliency_reduction = "sample"
    chunks, hs = torch.randn(2, 3, 3, 4, 5, dtype=torch.float64).unbind(), []
    for x in chunks:
        vectors = norm.weight[[0, 2, 5]], norm.bias[[0, 2, 5]]
        h = F.batch_norm(x, None, None, *vectors, training=True)
        h.retain_grad()
        h.relu().square().sum().backward()
        hs.append(h)
        norm(x).square().sum().backward()
    both = torch.cat([h.detach() for h in hs])
    both.grad = torch.cat([h.grad for h in hs])
    for reduction in ("batch", "sample"):
        _same(norm.saliency_meter.read(reduction), _definition(both, reduction))
    norm.set_active(ACTIVE)
    assert norm.saliency_meter.read("sample") is not None
    norm.set_active(ChannelSet([0, 2, 6], 7))
    assert norm.saliency_meter.read("sample") is None


def test_nothing_is_measured_in_eval_or_without_gradients() -> None:
    norm = _norm()
    norm.saliency_reduction = "batch"
    x = torch.randn(3, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    norm.eval()(x).sum().backward()
    assert norm.saliency_meter.read("batch") is None
    with torch.no_grad():
        norm.train()(x)
    assert norm.saliency_meter.read("batch") is None
    norm.saliency_reduction = None
    norm(x).sum().backward()
    assert norm.saliency_meter.read("batch") is None


def test_read_refuses() -> None:
    meter = SaliencyMeter()
    with pytest.raises(ValueError, match="expected reduction 'batch' or 'sample', got 'mean'"):
        meter.read("mean")  # type: ignore[arg-type]
    probe = meter.probe(2, 3, torch.zeros(1), "batch")
    probe.pixels.append(16)
    (probe.tensor * 2).sum().backward()
    with pytest.raises(ValueError, match="saliency_reduction = 'sample' to be set before backward"):
        meter.read("sample")


def _chain() -> tuple[SparseChannelConv2d, SparseChannelConv2d]:
    first = SparseChannelConv2d(4, 7, 3, compact_output=True).set_active(out=ACTIVE)
    second = SparseChannelConv2d(7, 2, 1)
    second.layer_name = "second"
    return first, second


def test_check_catches_a_wrong_set_of_the_right_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCX_CHECK", "1")
    first, second = _chain()
    norm = SparseChannelBatchNorm2d(7)
    norm.layer_name = "norm"
    x, wrong = torch.randn(2, 4, 5, 5), ChannelSet([0, 2, 6], 7)
    second.set_active(in_=ChannelSet([0, 2, 5], 7))  # equal, not identical
    assert second(norm.set_active(ACTIVE)(first(x))).shape == (2, 2, 3, 3)
    message = r"second: expected x over ChannelSet\(\[0, 2, 6\].*, got x over ChannelSet\(\[0, 2, 5"
    with pytest.raises(ValueError, match=message):
        second.set_active(in_=wrong)(first(x))
    with pytest.raises(ValueError, match="second: expected x over"):
        second(norm(first(x)))  # the norm passes the tag on
    with pytest.raises(ValueError, match="norm: expected x over"):
        norm.set_active(wrong)(first(x))


@pytest.mark.parametrize("value", ["0", ""])
def test_check_is_off_unless_asked(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("DCX_CHECK", value)
    first, second = _chain()
    y = first(torch.randn(2, 4, 5, 5))
    assert not hasattr(y, "_dcx_active")
    second.set_active(in_=ChannelSet([0, 2, 6], 7))(y)
