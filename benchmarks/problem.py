"""What is trained: network, batch, and the channel sets of every step, all seeded."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn

import dcx_kernels as dcx
from dcx_kernels.graph.walk import Residual
from dcx_kernels.recipes.networks import build_network

__all__ = [
    "GRIDS", "LAYOUTS", "Problem", "SetStream", "Structure", "Widths", "equal_widths", "on_grid",
    "vary_widths",
]  # fmt: skip

Widths = dict[str, int]

LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
SPREAD = 0.4  # of the varying regime
GRIDS = ("exact", "aligned", "odd")

# As many layers as their namesakes and next to nothing to compute: a step costs what the host does.
HOST_NETWORKS = {
    "densenet121-host": lambda: torchvision.models.DenseNet(4, (6, 12, 24, 16), 8, num_classes=10),
}


@dataclass(frozen=True)
class Problem:
    """One configuration of the benchmark.

    Args:
        model: name of a function in `dcx_kernels.models`, of one in torchvision, or of
            `HOST_NETWORKS`.
        width: factor on its channel counts (of ours).
        density: kept fraction of every group.
        layout: "NCHW" or "NHWC".
        residual: what `dcx.convert` does with channels that are added.
        extent: height and width of an image.
        device: where it is trained, "cpu" or "cuda".
        dtype: "float32", or what `torch.autocast` computes in, as "bfloat16".
        grid: of the widths, see `on_grid`.
    """

    model: str
    batch: int
    density: float
    layout: str
    width: float = 1.0
    residual: Residual = "keep"
    seed: int = 0
    extent: int = 32
    device: str = "cpu"
    dtype: str = "float32"
    grid: str = "exact"

    @property
    def label(self) -> str:
        """Name of the network, with width factor and residual policy where they are not usual."""
        label = self.model if self.width == 1.0 else f"{self.model}-x{self.width:g}"
        return label if self.residual == "keep" else f"{label}-{self.residual}"

    def network(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Build the dense network; every call gives the same weights."""
        network = copy.deepcopy(_network(self.model, self.width, self.seed))
        torch.manual_seed(self.seed)  # of dropout
        return network.to(dtype).train()

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context that forward passes run in."""
        wanted = getattr(torch, self.dtype)
        return torch.autocast(self.device, wanted, enabled=wanted != torch.float32)

    def data(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return images and labels, the same every time."""
        generator = torch.Generator(self.device).manual_seed(self.seed + 1)
        drawn = {"generator": generator, "device": self.device}
        shape = (self.batch, 3, self.extent, self.extent)
        images = torch.randn(shape, dtype=torch.float64, **drawn)
        labels = torch.randint(10, (self.batch,), **drawn)
        return images.to(dtype).contiguous(memory_format=LAYOUTS[self.layout]), labels

    def converted(
        self, execution: Any, saliency: Any = None, dtype: torch.dtype = torch.float32
    ) -> dcx.ChannelModel:
        """Return the network converted for sparse or masked execution."""
        example = torch.zeros(1, 3, self.extent, self.extent, dtype=dtype)
        return dcx.convert(
            self.network(dtype), example, self.residual, execution, saliency=saliency
        ).to(self.device)


@functools.lru_cache(maxsize=2)  # filling VGG-19 with random numbers takes seconds
def _network(model: str, width: float, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if model in HOST_NETWORKS:
        return HOST_NETWORKS[model]()
    return build_network(model, 10, width)


class Side(NamedTuple):
    """Input or output of a layer: how many channels each group has there, and how many exist."""

    groups: Mapping[str, int]
    channels: int

    def kept(self, fractions: Mapping[str, float]) -> float:
        """Return the kept fraction of this side."""
        gone = sum(count * (1 - fractions[name]) for name, count in self.groups.items())
        return 1 - gone / self.channels


@dataclass(frozen=True)
class Structure:
    """Channels of the selectable groups, and how every layer's arithmetic depends on them."""

    channels: Mapping[str, int]
    layers: tuple[tuple[int, tuple[Side, ...]], ...]

    @classmethod
    def of(cls, model: dcx.ChannelModel) -> Structure:
        """Read the structure off a converted model with all channels active."""
        found: dict[tuple[str, str], dict[str, int]] = {}
        for name, group in model.groups.items():
            for member in group.members if group.selectable else ():
                side = "in" if member.role == "consumer" else "out"
                found.setdefault((member.module, side), {})[name] = len(member.positions)
        layers = [layer for layer in dcx.cost(model).layers if layer.macs]
        sides = (
            tuple(
                Side(found[layer.name, side], max(1, whole // _inner(model, layer.name, side)))
                for side, whole in (("in", layer.in_active), ("out", layer.out_active))
                if (layer.name, side) in found
            )
            for layer in layers
        )
        return cls(
            {name: g.num_channels for name, g in model.groups.items() if g.selectable},
            tuple(zip((layer.macs for layer in layers), sides, strict=True)),
        )

    def macs(self, widths: Mapping[str, int]) -> int:
        """Count the multiply-accumulates of one image's forward at the given widths.

        Where a sum has the union of its terms' channels the count is an upper bound.
        """
        fractions = {name: widths[name] / count for name, count in self.channels.items()}
        total = 0.0
        for macs, sides in self.layers:
            for side in sides:
                macs = macs * side.kept(fractions)
            total += macs
        return round(total)


def _inner(model: dcx.ChannelModel, module: str, side: str) -> int:
    axes = model.structure.axes[module]
    return (axes.in_ if side == "in" else axes.out).inner


def on_grid(width: float, channels: int, grid: str = "exact") -> int:
    """Round a width, to at least 1 and at most all channels.

    Args:
        width: wanted.
        channels: that exist.
        grid: "exact": the nearest; "aligned": the nearest multiple of 8 (all channels are as good);
            "odd": no multiple of 2, the nearest below.
    """
    if grid == "aligned" and channels > 8:
        whole = max(8, 8 * round(width / 8))
        return channels if whole > channels else whole
    nearest = min(channels, max(1, round(width)))
    return nearest - 1 if grid == "odd" and nearest % 2 == 0 else nearest


def equal_widths(structure: Structure, density: float, grid: str = "exact") -> Widths:
    """Keep the same fraction of every group, rounded."""
    return {name: on_grid(density * c, c, grid) for name, c in structure.channels.items()}


def vary_widths(
    structure: Structure, density: float, generator: torch.Generator, grid: str = "exact"
) -> Widths:
    """Draw widths within +-40 % of the density, then scale all to the arithmetic at the density.

    Equal arithmetic is what makes the times of the two regimes comparable. Close to density 1 the
    scaling leaves little to vary; at 1 it leaves nothing.
    """
    target = structure.macs(equal_widths(structure, density, grid))
    draw = torch.rand(len(structure.channels), generator=generator)
    factors = (density * (1 - SPREAD + 2 * SPREAD * draw)).tolist()

    def scaled(scale: float) -> Widths:
        pairs = zip(structure.channels.items(), factors, strict=True)
        return {name: on_grid(scale * f * c, c, grid) for (name, c), f in pairs}

    low, high = 0.0, 2 / min(factors)
    for _ in range(20):
        middle = (low + high) / 2
        if structure.macs(scaled(middle)) < target:
            low = middle
        else:
            high = middle
    return scaled(high)


class SetStream:
    """Random channel sets for step after step.

    Args:
        varying: draw new widths for every step as well.
        grid: of the widths, see `on_grid`.

    Attributes:
        widths: those of the latest sets.
    """

    def __init__(
        self, structure: Structure, density: float, varying: bool, seed: int, grid: str = "exact"
    ) -> None:
        self.structure, self.density, self.varying = structure, density, varying
        self.grid = grid
        self._generator = torch.Generator().manual_seed(seed)
        self.widths = equal_widths(structure, density, grid)
        self._latest: dict[str, dcx.ChannelSet] | None = None

    @property
    def latest(self) -> dict[str, dcx.ChannelSet]:
        """The sets drawn last, or the first ones."""
        return self.fresh() if self._latest is None else self._latest

    def fresh(self) -> dict[str, dcx.ChannelSet]:
        """Draw the sets of the next step."""
        if self.varying:
            self.widths = vary_widths(self.structure, self.density, self._generator, self.grid)
        sets = {}
        for name, channels in self.structure.channels.items():
            chosen = torch.randperm(channels, generator=self._generator)[: self.widths[name]]
            sets[name] = dcx.ChannelSet.trusted(chosen.sort().values, channels)
        self._latest = sets
        return sets
