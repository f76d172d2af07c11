"""The gated convolution skips on every backend, in every batch; what it skips is never read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcx_kernels.nn.gated_conv import GatedConv2d
from dcx_kernels.nn.gated_conv_channels import SampleChannels
from gated_oracle import odd_case
from tolerances import assert_gradients_close

pytestmark = pytest.mark.usefixtures("one_thread")


def case(stats: str = "batch") -> tuple[GatedConv2d, SampleChannels]:
    """Make a layer whose winners are 0, 2 and 4, and an input of three channels a sample."""
    layer = GatedConv2d(5, 7, 3, density=0.4, stats=stats, dtype=torch.float64)  # type: ignore[arg-type]
    odd_case(layer)
    with torch.no_grad():
        layer.phi.zero_()
        layer.rho.copy_(torch.tensor([9.0, 0, 8, 0, 7, 0, 0]))
    idx = torch.stack([torch.randperm(4)[:3].sort().values for _ in range(9)])  # 4 is nowhere
    return layer, SampleChannels(torch.randn(9, 3, 6, 5).double(), idx, 5)


def poisoned(layer: GatedConv2d) -> None:
    with torch.no_grad():
        layer.weight[[1, 3, 5, 6]] = torch.nan
        layer.weight[:, 4] = torch.nan


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_evaluation_reads_winners_only(
    backend: str, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = case()
    layer.eval()
    x = x._replace(values=x.values[:n], idx=x.idx[:n])  # type: ignore[index]
    _need(backend, monkeypatch)
    with torch.no_grad():
        layer.execution = "mask"
        wanted = layer(x)
        poisoned(layer)
        assert not layer(x).isfinite().all()  # a mask multiplies NaN by zero
        layer.execution = "sparse"
        assert_gradients_close({"y": layer(x)}, {"y": wanted})


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_active_training_reads_winners_only(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = case(stats="active")
    _need(backend, monkeypatch)
    poisoned(layer)
    values = x.values.clone().requires_grad_()
    y: Tensor = layer(x._replace(values=values))
    y.square().sum().backward()
    assert y.isfinite().all() and values.grad is not None and values.grad.isfinite().all()
    assert layer.weight.grad is not None and layer.weight.grad.isfinite().all()
    assert (layer.weight.grad[:, 4] == 0).all() and (layer.weight.grad[1] == 0).all()


def _need(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dcx_kernels.kernels import backend as backends

    if not any(
        status.name.startswith(backend) and status.available for status in backends.describe()
    ):
        pytest.skip(f"no {backend} backend here")
    monkeypatch.setenv("DCX_BACKEND", backend)
