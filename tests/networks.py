"""Small networks that hold one of everything the graph has a rule for, and the masked oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dcx_kernels as dcx
from dcx_kernels.models import vgg19

__all__ = [
    "NETWORKS", "Branches", "Chain", "MaskedOracle", "Residual", "Streams", "batch", "random_sets",
]  # fmt: skip


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
    """What the policies decide: an add and a grouped convolution."""

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


class Streams(nn.Module):
    """Residual blocks, a strided shortcut with padded channels, a sum of sums, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 9, 3, padding=1), nn.BatchNorm2d(9), nn.PReLU(9))
        self.inside = nn.Sequential(nn.Conv2d(9, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU())
        self.back = nn.Sequential(nn.Conv2d(5, 9, 1, bias=False), nn.BatchNorm2d(9))
        self.down = nn.Sequential(
            nn.Conv2d(9, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12)
        )
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.last = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 9, 9) -> (N, 5)."""
        x = self.stem(x)
        x = F.relu(self.back(self.inside(x)) + x)
        x = F.relu(self.down(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2)))
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1))))
        x = x + self.last(x * torch.sigmoid(gate))
        return self.head(x.mean((2, 3)))


class Branches(nn.Module):
    """Concatenations read by several, chunks, a shuffle, a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.grow = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1))
        self.side = nn.Sequential(nn.Conv2d(10, 7, 1, bias=False), nn.BatchNorm2d(7), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(10, 10, 3, padding=1, groups=10), nn.BatchNorm2d(10))
        self.mix = nn.Conv2d(5, 3, 1)
        self.head = nn.Linear((7 + 5 + 3) * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 9, 9) -> (N, 5)."""
        x = self.stem(x)
        x = torch.cat([x, self.grow(x)], 1)
        n, c, h, w = x.size()
        y = self.deep(x).view(n, 2, c // 2, h, w).transpose(1, 2).flatten(1, 2)
        low, high = y.chunk(2, dim=1)
        x = torch.cat([self.side(x), low, F.relu(self.mix(high))], 1)
        return self.head(F.adaptive_max_pool2d(x, 2).flatten(1))


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "vgg19": lambda: (vgg19(num_classes=5, width=1 / 16), torch.randn(8, 3, 32, 32)),
    "chain": lambda: (Chain(), torch.randn(6, 3, 9, 9)),
    "residual": lambda: (Residual(), torch.randn(6, 3, 9, 9)),
    "streams": lambda: (Streams(), torch.randn(6, 3, 9, 9)),
    "branches": lambda: (Branches(), torch.randn(6, 3, 9, 9)),
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
            run = group.num_channels // group.runs  # equally many in each, where a group has runs
            count = max(1, round(density * run))
            starts = range(0, group.num_channels, run)
            chosen = [torch.randperm(run)[:count] + start for start in starts]
            sets[name] = dcx.ChannelSet(torch.cat(chosen), group.num_channels)
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
        residual: Any = "keep",
    ) -> None:
        self.model = dcx.convert(network, x, residual, execution="mask", saliency="sample")
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
        """Active entries by the numbers of a layer's channels: outer product of both sides."""
        axes = self.model.structure.axes.get(name.rpartition(".")[0])
        if axes is None:
            return torch.ones(parameter.shape, dtype=torch.bool)
        on = self._active_numbers()
        rows = torch.tensor([number in on for number in axes.out.ids.tolist()])
        if parameter.dim() == 1:
            return rows
        columns = torch.tensor([number in on for number in axes.in_.ids.tolist()])
        columns = columns.repeat_interleave(axes.in_.inner)
        if axes.kind == "follower":  # a depthwise filter has one input channel, its own
            columns = torch.ones(1, dtype=torch.bool)
        groups = columns.numel() // parameter.shape[1]
        if groups > 1:  # each row sees the inputs of its group
            of_row = torch.arange(len(rows)) // (len(rows) // groups)
            mask = rows[:, None] & columns.view(groups, -1)[of_row]
        else:
            mask = rows[:, None] & columns
        return mask.view(*parameter.shape[:2], *[1] * (parameter.dim() - 2))

    def _active_numbers(self) -> set[int]:
        structure = self.model.structure
        on = {0}
        for name, numbers in structure.channels.items():
            active = self.model.active.get(name)
            chosen = range(len(numbers)) if active is None else active.indices.tolist()
            on |= {int(numbers[i]) for i in chosen}
        for union in structure.unions:
            for place, number in enumerate(union.ids.tolist()):
                if any(int(part[place]) in on for part in union.parts):
                    on.add(number)
        return on
