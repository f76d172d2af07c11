"""What is trained: network, batch, and the channel sets of every step, all seeded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import dcx_kernels as dcx
from dcx_kernels import models

__all__ = ["LAYOUTS", "Problem", "SetStream", "Structure", "Widths", "equal_widths", "vary_widths"]

Widths = dict[str, int]

LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
SPREAD = 0.4  # of the varying regime


@dataclass(frozen=True)
class Problem:
    """One configuration of the benchmark.

    Args:
        model: name of a function in `dcx_kernels.models`.
        width: factor on its channel counts.
        density: kept fraction of every layer.
        layout: "NCHW" or "NHWC".
    """

    model: str
    batch: int
    density: float
    layout: str
    width: float = 1.0
    seed: int = 0

    @property
    def label(self) -> str:
        """Name of the network, with its width factor if there is one."""
        return self.model if self.width == 1.0 else f"{self.model}-x{self.width:g}"

    def network(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Build the dense network; every call gives the same weights."""
        torch.manual_seed(self.seed)
        build: Any = getattr(models, self.model)
        network: nn.Module = build(width=self.width).to(dtype)
        return network.train()

    def data(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return images and labels, the same every time."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        images = torch.randn(self.batch, 3, 32, 32, generator=generator, dtype=torch.float64)
        labels = torch.randint(10, (self.batch,), generator=generator)
        return images.to(dtype).contiguous(memory_format=LAYOUTS[self.layout]), labels

    def converted(
        self, execution: Any, saliency: Any = None, dtype: torch.dtype = torch.float32
    ) -> dcx.ChannelModel:
        """Return the network converted for sparse or masked execution."""
        example = torch.zeros(1, 3, 32, 32, dtype=dtype)
        return dcx.convert(self.network(dtype), example, execution=execution, saliency=saliency)


@dataclass(frozen=True)
class Structure:
    """Channels of the selectable groups, and which of them every layer's arithmetic depends on."""

    channels: Mapping[str, int]
    layers: tuple[tuple[int, tuple[str, ...]], ...]

    @classmethod
    def of(cls, model: dcx.ChannelModel) -> Structure:
        """Read the structure off a converted model with all channels active."""
        sides: dict[str, list[str]] = {}
        for name, group in model.groups.items():
            for member in group.members if group.selectable else ():
                if member.role != "norm":
                    sides.setdefault(member.module, []).append(name)
        layers = dcx.cost(model).layers
        return cls(
            {name: g.num_channels for name, g in model.groups.items() if g.selectable},
            tuple((layer.macs, tuple(sides.get(layer.name, ()))) for layer in layers if layer.macs),
        )

    def macs(self, widths: Mapping[str, int]) -> int:
        """Count the multiply-accumulates of one image's forward at the given widths."""
        total = 0
        for macs, groups in self.layers:
            for group in groups:
                macs = macs * widths[group] // self.channels[group]
            total += macs
        return total


def equal_widths(structure: Structure, density: float) -> Widths:
    """Keep the same fraction of every group, rounded, at least one channel."""
    return {name: max(1, round(density * c)) for name, c in structure.channels.items()}


def vary_widths(structure: Structure, density: float, generator: torch.Generator) -> Widths:
    """Draw widths within +-40 % of the density, then scale all to the arithmetic at the density.

    Equal arithmetic is what makes the times of the two regimes comparable. Close to density 1 the
    scaling leaves little to vary; at 1 it leaves nothing.
    """
    target = structure.macs(equal_widths(structure, density))
    draw = torch.rand(len(structure.channels), generator=generator)
    factors = (density * (1 - SPREAD + 2 * SPREAD * draw)).tolist()

    def scaled(scale: float) -> Widths:
        pairs = zip(structure.channels.items(), factors, strict=True)
        return {name: min(c, max(1, round(scale * f * c))) for (name, c), f in pairs}

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

    Attributes:
        widths: those of the latest sets.
    """

    def __init__(self, structure: Structure, density: float, varying: bool, seed: int) -> None:
        self.structure, self.density, self.varying = structure, density, varying
        self._generator = torch.Generator().manual_seed(seed)
        self.widths = equal_widths(structure, density)
        self._latest: dict[str, dcx.ChannelSet] | None = None

    @property
    def latest(self) -> dict[str, dcx.ChannelSet]:
        """The sets drawn last, or the first ones."""
        return self.fresh() if self._latest is None else self._latest

    def fresh(self) -> dict[str, dcx.ChannelSet]:
        """Draw the sets of the next step."""
        if self.varying:
            self.widths = vary_widths(self.structure, self.density, self._generator)
        sets = {}
        for name, channels in self.structure.channels.items():
            chosen = torch.randperm(channels, generator=self._generator)[: self.widths[name]]
            sets[name] = dcx.ChannelSet.trusted(chosen.sort().values, channels)
        self._latest = sets
        return sets
