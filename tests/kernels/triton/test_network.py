"""Whole networks trained by the Triton backend: the numbers of the reference, and no waiting."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dcx_kernels as dcx
from dcx_kernels.kernels import tiles
from networks import NETWORKS, random_sets
from tolerances import assert_close_to_float64


class Small(nn.Module):
    """What the fusion meets: chains of convolution, norm and ReLU, an add, a depthwise filter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 7, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(7)
        self.inside = nn.Conv2d(7, 9, 3, stride=2, padding=1)
        self.inside_norm = nn.BatchNorm2d(9)
        self.back = nn.Conv2d(9, 5, 1, bias=False)
        self.back_norm = nn.BatchNorm2d(5)
        self.shortcut = nn.Conv2d(7, 5, 1, stride=2)
        self.deep = nn.Conv2d(5, 5, 3, padding=1, groups=5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 4)."""
        x = F.relu(self.norm(self.stem(x)))
        y = self.back_norm(self.back(F.relu(self.inside_norm(self.inside(x)))))
        x = F.relu(y + self.shortcut(x))
        return self.head(self.deep(x).mean((2, 3)))


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DCX_CONV", "own")
    with tiles.forced(tiles.Tile(64, 16, 16, 4, 2)):
        yield


def train(dtype: torch.dtype, device: torch.device, residual: str) -> dict[str, Tensor]:
    """Train two steps with new sets each; return outputs, weights and saliency."""
    torch.manual_seed(3)
    net = Small().to(device, dtype)
    x = torch.randn(3, 3, 6, 5).to(device, dtype).contiguous(memory_format=torch.channels_last)
    t = torch.tensor([0, 2, 1], device=device)
    model = dcx.convert(net, x, residual, saliency="sample")  # type: ignore[arg-type]
    optimizer = dcx.optim.SGD(model, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
    found = {}
    for step in range(2):
        model.set_active(random_sets(model))
        optimizer.zero_grad()
        F.cross_entropy(model(x), t).backward()
        for name, saliency in model.saliency("sample").items():
            found[f"saliency {name} {step}"] = saliency
        optimizer.step()
    model.eval()
    with torch.no_grad():
        found["logits"] = model(x)
    found.update((k, v) for k, v in model.state_dict().items() if v.is_floating_point())
    return found


@pytest.mark.parametrize("residual", ["keep", "union"])
def test_trains_like_the_reference(
    residual: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DCX_BACKEND", "triton")
    ours = train(torch.float32, device, residual)
    monkeypatch.setenv("DCX_BACKEND", "reference")
    theirs = train(torch.float32, device, residual)
    truth = train(torch.float64, device, residual)
    assert ours.keys() == truth.keys()
    joined = ([found[name].flatten() for name in truth] for found in (ours, theirs, truth))
    one, same, exact = (torch.cat(parts) for parts in joined)
    assert_close_to_float64(one, same, exact.double())


@pytest.mark.gpu
@pytest.mark.parametrize("network", [name for name in NETWORKS if name != "vgg19"])
def test_networks_on_a_gpu(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = NETWORKS[network]().cuda().double(), torch.randn(4, 3, 9, 9).cuda().double()
    model = dcx.convert(net, x)
    masked = dcx.convert(net, x, execution="mask")
    sets = random_sets(model)
    model.set_active(sets)
    masked.set_active(sets)
    torch.testing.assert_close(model(x), masked(x), rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu() -> None:
    net = Small().cuda()
    x = torch.randn(8, 3, 16, 16).cuda().contiguous(memory_format=torch.channels_last)
    t = torch.randint(4, (8,)).cuda()
    model = dcx.convert(net, x)
    optimizer = dcx.optim.SGD(model, lr=0.05, momentum=0.9)

    def step() -> None:
        model.set_active(random_sets(model))
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(x), t)
        loss.backward()
        optimizer.step()

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not [str(one.message) for one in caught if "synchroniz" in str(one.message)]
