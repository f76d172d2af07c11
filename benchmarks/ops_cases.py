"""One operator on one layer shape, in every arm; inputs are made once, outside the timed part.

Every arm is a function without arguments; ``dense_of`` turns its result into the dense one, zeros
at inactive channels, so that all arms are checked against the same truth. As in training, sparse
fwd packs the weight and its backward finds it packed.

Legend: N batch, K out and C in channels (``k``, ``c``: active counts), H W extent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import dcx_kernels as dcx

__all__ = ["CONV_ARMS", "LAYERS", "BatchNormCase", "ConvCase", "Run", "random_set"]

CONV_ARMS = ("dense", "mask", "thin", "naive", "sparse")
_PADDING = 1


class LayerShape(NamedTuple):
    """A 3x3 convolution with padding 1."""

    channels_in: int
    channels_out: int
    extent: int


# layers of VGG-19 on 32x32 images: one of each stage
LAYERS = {
    "vgg19_conv1_2": LayerShape(64, 64, 32),
    "vgg19_conv2_2": LayerShape(128, 128, 16),
    "vgg19_conv3_2": LayerShape(256, 256, 8),
    "vgg19_conv4_2": LayerShape(512, 512, 4),
    "vgg19_conv5_2": LayerShape(512, 512, 2),
}


class Run(NamedTuple):
    """What is timed, and how to compare its result."""

    call: Callable[[], Tensor]
    dense_of: Callable[[Tensor], Tensor]


def random_set(channels: int, density: float, seed: int) -> dcx.ChannelSet:
    """Draw a set of the given density."""
    generator = torch.Generator().manual_seed(seed)
    count = max(1, round(density * channels))
    chosen = torch.randperm(channels, generator=generator)[:count]
    return dcx.ChannelSet(chosen, channels)


class ConvCase:
    """A channel convolution: fwd, dgrad, wgrad in every arm.

    Args:
        dtype: float32 to time, float64 for the truth.
        layout: memory format of activations.
    """

    def __init__(
        self,
        layer: LayerShape,
        density: float,
        batch: int,
        layout: torch.memory_format,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.s_in = random_set(layer.channels_in, density, 1)
        self.s_out = random_set(layer.channels_out, density, 2)
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        size = (layer.extent, layer.extent)
        self.x = normal(batch, layer.channels_in, *size).contiguous(memory_format=layout)
        self.dy = normal(batch, layer.channels_out, *size).contiguous(memory_format=layout)
        self.weight = normal(layer.channels_out, layer.channels_in, 3, 3)
        self.x_c = self.x[:, self.s_in.indices].contiguous(memory_format=layout)
        self.dy_c = self.dy[:, self.s_out.indices].contiguous(memory_format=layout)
        self.weight_c = self.weight[self.s_out.indices][:, self.s_in.indices].contiguous()
        self.in_mask = self.s_in.mask().to(dtype).view(1, -1, 1, 1)
        self.out_mask = self.s_out.mask().to(dtype).view(1, -1, 1, 1)
        self.macs = batch * layer.extent**2 * self.weight_c.numel()

    def run(self, op: str, arm: str) -> Run:
        """Return one arm of "fwd", "dgrad" or "wgrad"."""
        run: Run = getattr(self, f"_{op}")(arm)
        return run

    def _fwd(self, arm: str) -> Run:
        if arm == "sparse":
            sets = {"in_active": self.s_in, "out_active": self.s_out}
            return Run(
                lambda: dcx.channel_conv2d(self.x_c, self.weight, padding=_PADDING, **sets),
                self._scatter_out,
            )
        if arm == "thin":
            return Run(
                lambda: F.conv2d(self.x_c, self.weight_c, padding=_PADDING), self._scatter_out
            )
        if arm == "mask":
            return Run(
                lambda: (
                    F.conv2d(self.x * self.in_mask, self.weight, padding=_PADDING) * self.out_mask
                ),
                _same,
            )
        if arm == "naive":
            return Run(self._naive_fwd, _same)
        return Run(lambda: F.conv2d(self.x, self.weight, padding=_PADDING), _same)

    def _naive_fwd(self) -> Tensor:
        y = F.conv2d(self._gather_in(), self._gather_weight(), padding=_PADDING)
        return torch.zeros_like(self.dy).index_copy_(1, self.s_out.indices, y)

    def _dgrad(self, arm: str) -> Run:
        x, weight, dy = self._operands(arm)
        x = x.detach().requires_grad_()
        grad = self._backward(arm, x, weight, dy, wanted=x)
        if arm == "naive":
            into = torch.zeros_like
            return Run(
                lambda: into(self.x).index_copy_(1, self.s_in.indices, grad(self._gather_out())),
                _same,
            )
        if arm == "mask":
            return Run(lambda: grad(self.dy * self.out_mask) * self.in_mask, _same)
        return Run(lambda: grad(dy), _same if arm == "dense" else self._scatter_in)

    def _wgrad(self, arm: str) -> Run:
        x, weight, dy = self._operands(arm)
        weight = weight.detach().requires_grad_()
        grad = self._backward(arm, x, weight, dy, wanted=weight)
        if arm == "naive":
            return Run(lambda: self._scatter_weight(grad(self._gather_out())), _same)
        if arm == "mask":
            # the masked input was saved by forward
            return Run(lambda: grad(self.dy * self.out_mask), _same)
        return Run(lambda: grad(dy), _same if arm == "dense" else self._scatter_weight)

    def _operands(self, arm: str) -> tuple[Tensor, Tensor, Tensor]:
        if arm in ("sparse", "thin", "naive"):
            return self.x_c, self.weight_c, self.dy_c
        return (self.x * self.in_mask if arm == "mask" else self.x), self.weight, self.dy

    def _backward(
        self, arm: str, x: Tensor, weight: Tensor, dy: Tensor, wanted: Tensor
    ) -> Callable[[Tensor], Tensor]:
        if arm == "sparse":
            sets = {"in_active": self.s_in, "out_active": self.s_out}
            y = dcx.channel_conv2d(x, weight, padding=_PADDING, packed=True, **sets)
        else:
            y = F.conv2d(x, weight, padding=_PADDING)
        return lambda grad: torch.autograd.grad(y, wanted, grad, retain_graph=True)[0]

    def _gather_in(self) -> Tensor:
        return self.x.index_select(1, self.s_in.indices)

    def _gather_out(self) -> Tensor:
        return self.dy.index_select(1, self.s_out.indices)

    def _gather_weight(self) -> Tensor:
        rows = self.weight.index_select(0, self.s_out.indices)
        return rows.index_select(1, self.s_in.indices)

    def _scatter_weight(self, dw: Tensor) -> Tensor:
        rows = dw.new_zeros(len(self.s_out), *self.weight.shape[1:])
        rows.index_copy_(1, self.s_in.indices, dw)
        return torch.zeros_like(self.weight).index_copy_(0, self.s_out.indices, rows)

    def _scatter_in(self, dx: Tensor) -> Tensor:
        return torch.zeros_like(self.x).index_copy_(1, self.s_in.indices, dx)

    def _scatter_out(self, y: Tensor) -> Tensor:
        return torch.zeros_like(self.dy).index_copy_(1, self.s_out.indices, y)


class BatchNormCase:
    """Batch norm with ReLU, forward and backward; sparse measures saliency as well."""

    def __init__(
        self,
        layer: LayerShape,
        density: float,
        batch: int,
        layout: torch.memory_format,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        conv = ConvCase(layer, density, batch, layout, dtype)
        self.active, self.mask = conv.s_out, conv.out_mask
        self.dy, self.dy_c = conv.dy, conv.dy_c
        self.x = (conv.dy.roll(1, 2) + 0.1).contiguous(memory_format=layout)
        self.x_c = self.x[:, self.active.indices].contiguous(memory_format=layout)
        self.channels = layer.channels_out
        self.bytes = 5 * self.x_c.numel() * self.x_c.element_size()  # read x, dy, y; write y, dx

    def run(self, arm: str) -> Run:
        """Return one arm; its result is dx."""
        x = (self.x_c if arm in ("sparse", "thin") else self.x).detach().requires_grad_()
        dy = self.dy_c if arm in ("sparse", "thin") else self.dy
        count = x.shape[1]
        weight = torch.full((count,), 0.9, dtype=x.dtype, requires_grad=True)
        bias = torch.full((count,), 0.1, dtype=x.dtype, requires_grad=True)
        size = self.channels if arm == "sparse" else count
        mean, var = torch.zeros(size, dtype=x.dtype), torch.ones(size, dtype=x.dtype)
        probe = torch.zeros(count, dtype=x.dtype, requires_grad=True)

        def sparse() -> Tensor:
            y = dcx.channel_batch_norm(
                x, mean, var, weight, bias, training=True,
                active=self.active, relu=True, probe=probe,
            )  # fmt: skip
            return torch.autograd.grad(y, [x, weight, bias, probe], dy)[0]

        def plain() -> Tensor:
            y = F.batch_norm(x, mean, var, weight, bias, training=True).relu_()
            if arm == "mask":
                y = y * self.mask
            return torch.autograd.grad(y, [x, weight, bias], dy)[0]

        return Run(sparse if arm == "sparse" else plain, self._dense(arm))

    def _dense(self, arm: str) -> Callable[[Tensor], Tensor]:
        if arm in ("dense", "mask"):
            return _same
        into = torch.zeros_like
        return lambda dx: into(self.x).index_copy_(1, self.active.indices, dx)


def _same(result: Tensor) -> Tensor:
    return result
