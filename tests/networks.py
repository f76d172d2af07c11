"""Small networks that hold one of everything the graph has a rule for, and the masked oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dcx_kernels as dcx
from dcx_kernels.models import vgg19

__all__ = ["NETWORKS", "Chain", "MaskedOracle", "Residual", "batch", "random_sets"]


class Chain(nn.Module):
    """With and without bias and norm; odd widths, stride, dilation, features of several pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 7, 3, padding=1, bias=True)
        self.norm = nn.BatchNorm2d(7)
        self.down = nn.Conv2d(7, 10, 3, stride=2, padding="valid", bias=False)
        self.down_norm = nn.BatchNorm2d(10, affine=False)
        self.plain = nn.Conv2d(10, 9, 3, padding="same", dilation=2)
        self.last = nn.Conv2d(9, 6, 3, padding=1, padding_mode="reflect")
        self.last_norm = nn.BatchNorm2d(6, momentum=None)
        self.hidden = nn.Linear(6 * 4, 11)
        self.head = nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 9, 9) -> (N, 5)."""
        x = F.relu(self.norm(self.stem(x)))
        x = F.leaky_relu(self.down_norm(self.down(x)), 0.1)
        x = F.silu(self.plain(x))
        x = F.max_pool2d(self.last_norm(self.last(x)).relu(), 2)
        x = x.reshape(x.size(0), -1)
        return self.head(torch.tanh(self.hidden(F.dropout(x, 0.0, self.training))))


class Residual(nn.Module):
    """What has no rule yet around what has: an add, a grouped conv, a layer norm, a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.inside = nn.Sequential(
            nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True)
        )
        self.back = nn.Conv2d(12, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.free = nn.Conv2d(8, 10, 1)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 9, 9) -> (N, 5)."""
        x = self.stem(x)
        x = x + self.back(self.inside(x))
        x = F.relu(self.free(self.grouped(x)))
        return self.head(x.mean((2, 3)))


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "vgg19": lambda: (vgg19(num_classes=5, width=1 / 16), torch.randn(8, 3, 32, 32)),
    "chain": lambda: (Chain(), torch.randn(6, 3, 9, 9)),
    "residual": lambda: (Residual(), torch.randn(6, 3, 9, 9)),
}


def batch(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a float64 network of `NETWORKS` and a batch for it."""
    network, x = NETWORKS[name]()
    return network.double(), x.double(), torch.randint(0, 5, (x.shape[0],))


def random_sets(
    model: dcx.ChannelModel, densities: tuple[float, ...] = (0.3, 0.5, 0.8)
) -> dict[str, dcx.ChannelSet]:
    """Draw a set for every selectable group, of a density drawn from ``densities``."""
    sets = {}
    for name, group in model.groups.items():
        if group.selectable:
            density = densities[int(torch.randint(len(densities), ()))]
            count = max(1, round(density * group.num_channels))
            sets[name] = dcx.ChannelSet(
                torch.randperm(group.num_channels)[:count], group.num_channels
            )
    return sets


class MaskedOracle:
    """The masked network with a torch optimizer: the executable definition of training.

    ``frozen``: after torch's step, every weight and optimizer entry outside the active slice is put
    back. Nothing of `dcx_kernels.optim` takes part.
    """

    def __init__(
        self,
        network: nn.Module,
        x: Tensor,
        make: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer],
        inactive: str,
    ) -> None:
        self.model = dcx.convert(network, x, execution="mask", saliency="sample")
        self.optimizer = make(self.model.parameters())
        self.inactive = inactive

    def step(self, sets: dict[str, dcx.ChannelSet], x: Tensor, t: Tensor) -> Tensor:
        """Train one step and return the logits."""
        self.model.set_active(sets)
        self.optimizer.zero_grad()
        y = self.model(x)
        F.cross_entropy(y, t).backward()
        if self.inactive == "decay":
            self.optimizer.step()
            return y
        before = {name: self._tensors(p) for name, p in self.model.named_parameters()}
        self.optimizer.step()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                mask = self._mask(name, parameter)
                for key, tensor in self._tensors(parameter, clone=False).items():
                    old = before[name].get(key, torch.zeros_like(tensor))
                    tensor.copy_(torch.where(mask, tensor, old))
        return y

    def _tensors(self, parameter: Tensor, clone: bool = True) -> dict[str, Tensor]:
        state = self.optimizer.state.get(parameter, {})
        found = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.dim() > 0}
        found[""] = parameter.data
        return {k: v.clone() for k, v in found.items()} if clone else found

    def _mask(self, name: str, parameter: Tensor) -> Tensor:
        """Active entries by the groups' members alone: outer product of both sides."""
        module = name.rpartition(".")[0]
        rows = torch.ones(parameter.shape[0], dtype=torch.bool)
        columns = torch.ones(parameter.shape[1] if parameter.dim() > 1 else 1, dtype=torch.bool)
        for group, active in self.model.active.items():
            for member in self.model.groups[group].members:
                if member.module != module:
                    continue
                if member.role != "consumer":
                    rows = active.mask()
                elif parameter.dim() > 1:
                    columns = active.mask().repeat_interleave(member.inner)
        if parameter.dim() == 1:
            return rows
        return (rows[:, None] & columns).view(*parameter.shape[:2], *[1] * (parameter.dim() - 2))
