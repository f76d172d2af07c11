"""The saliency of a group that several norms measure: the signed sum over all of them, then | |."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dcx_kernels as dcx
from networks import batch
from tolerances import assert_gradients_close

# group -> its norms and the place of its first channel on each, read off `networks` by hand
EXPECTED = {
    ("tied", "tie"): {"stem": {"norm": 0, "last_norm": 0}, "inside": {"inside_norm": 0}},
    ("branches", "keep"): {
        "stem.0": {"stem.1": 0, "grow.0": 0, "deep.1": 0},
        "grow.2": {"deep.1": 6},
        "side.0": {"side.1": 0},
    },
}


class Tied(nn.Module):
    """One residual block, a norm behind every convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inside, self.inside_norm = nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.last, self.last_norm = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 9, 9) -> (N, 5)."""
        x = F.relu(self.norm(self.stem(x)))
        y = F.relu(self.inside_norm(self.inside(x)))
        return self.head(F.relu(x + self.last_norm(self.last(y))).mean((2, 3)))


@pytest.mark.parametrize("execution", ["sparse", "mask"])
@pytest.mark.parametrize(("network", "residual"), list(EXPECTED))
def test_saliency_is_the_signed_sum_over_all_norms(
    network: str, residual: str, execution: str
) -> None:
    dense, x, t = batch("chain" if network == "tied" else network)
    dense = Tied().double() if network == "tied" else dense
    for module in dense.modules():
        if isinstance(module, nn.BatchNorm2d):  # so that the norms' sums are not alike
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
    model = dcx.convert(copy.deepcopy(dense), x, residual, execution, saliency="sample")
    F.cross_entropy(model(x), t).backward()
    signed = _signed_by_definition(dense, x, t)
    for group, norms in EXPECTED[network, residual].items():
        size = model.groups[group].num_channels
        parts = [signed[norm][:, start : start + size] for norm, start in norms.items()]
        total, pixels = sum(parts), 81
        expected = {
            "batch": (total.sum(0) / (len(x) * pixels)).abs(),
            "sample": (total / pixels).abs().mean(0),
        }
        got = {r: model.saliency(r)[group] for r in ("batch", "sample")}
        assert_gradients_close(got, expected)


def _signed_by_definition(dense: nn.Module, x: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Return the sums over pixels of (dL/dh) h, (N, C), of every norm's output h."""
    signed: dict[str, Tensor] = {}

    def measure(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, inputs: object, h: Tensor) -> None:
            feature = h.detach().clone()

            def store(dh: Tensor) -> None:
                signed[name] = (dh * feature).flatten(2).sum(2)

            h.register_hook(store)

        return hook

    for name, module in dense.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(measure(name))
    F.cross_entropy(dense(x), t).backward()
    return signed


def test_a_relu_behind_a_norm_in_one_mode_only_stays_in_that_mode() -> None:
    class Modes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.a(x))
            return self.head(F.relu(x) if self.training else F.leaky_relu(x, 0.5)).mean((2, 3))

    dense, x = Modes().double(), torch.randn(4, 3, 6, 6, dtype=torch.float64)
    model = dcx.convert(dense, x)
    for mode in (True, False):
        expected, got = dense.train(mode)(x), model.train(mode)(x)
        assert_gradients_close({"y": got.detach()}, {"y": expected.detach()})
