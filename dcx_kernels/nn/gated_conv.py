"""Convolution with feature boosting and suppression: every sample computes its own winners.

Legend: N batch, C in and K out channels (``c``, ``k``: those a sample has), H W input, P Q output.

References:
    Gao et al., "Dynamic Channel Pruning: Feature Boosting and Suppression", ICLR 2019.
    https://arxiv.org/abs/1810.05331
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcx_kernels.errors import expected
from dcx_kernels.kernels import backend
from dcx_kernels.nn.gated_conv_channels import SampleChannels, put_channels, take_channels
from dcx_kernels.nn.gated_conv_parts import (
    SUBSAMPLE,
    Subsample,
    active_norm,
    subsample,
    winners_of,
)
from dcx_kernels.ops._direct import direct
from dcx_kernels.ops.k_winners import k_winners
from dcx_kernels.ops.sample_conv2d import sample_conv2d

__all__ = ["GatedConv2d", "gate_penalty", "gated_layers"]

_OPTIONS = {
    "subsample": tuple(SUBSAMPLE),
    "beta_at": ("inside", "outside"),
    "stats": ("batch", "active"),
    "execution": ("sparse", "mask"),
}
# kept share of input channels up to which a kernel of samples beats a dense convolution, where all
# outputs are computed; native: measured on M-CifarNet's layers, batch 64
_INPUTS_WIN = {"native": 0.8, "triton": 0.6, "reference": 0.0}


class _Last:
    """What the gate said in the last forward; not part of a copy or a pickle."""

    gate: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Last:
        return _Last()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Last, ()


class GatedConv2d(nn.Conv2d):
    """y = ReLU(pi * (norm(conv(x)) + beta)), where pi holds the winners of a gate (eq. 5 to 8).

    The gate g = ReLU(s phi + rho) looks at one number a channel of its input, and pi is g at its k
    greatest channels, zero elsewhere: a sample's other channels are not computed. Batch norm has
    no affine; the convolution has no bias, beta stands for it.

    Args:
        density: d; k = ceil(d K) winners a sample, see `set_density`.
        subsample: s: ``l1`` (mean of |x|), ``l2``, ``linf`` or ``variance`` of every channel.
        beta_at: ``inside``: pi * (norm + beta), eq. 5; ``outside``: pi * norm + beta at channels
            with pi > 0, as in the published code.
        stats: what training normalises by: ``batch``: all samples, as the paper: losers feed the
            statistics, so that only input channels are skipped; ``active``: each channel's active
            samples alone: outputs are skipped too.
        relu: whether a ReLU ends the layer (before a residual add it does not).
        execution: ``sparse`` computes what exists; ``mask`` computes everything and multiplies by
            0/1: the papers' baseline, and the oracle.
        eps, momentum: of the norm.

    Attributes:
        compact_output: return `SampleChannels` instead of a dense tensor with zeros.

    Shape:
        x (N, C, H, W), dense or `SampleChannels` -> (N, K, P, Q). weight (K, C, R, S); phi (K, C);
        rho, beta (K,).

    Raises:
        ValueError: on unknown options, groups, or a padding that is not zeros, the same on both
            sides.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        *,
        density: float = 1.0,
        subsample: Subsample = "l1",
        beta_at: Literal["inside", "outside"] = "inside",
        stats: Literal["batch", "active"] = "batch",
        relu: bool = True,
        execution: Literal["sparse", "mask"] = "sparse",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = {
            "subsample": subsample, "beta_at": beta_at, "stats": stats, "execution": execution,
        }  # fmt: skip
        for name, given in options.items():
            if given not in _OPTIONS[name]:
                what = f"{name} to be one of {_OPTIONS[name]}"
                raise ValueError(expected(what, repr(given), "GatedConv2d"))
        if isinstance(padding, str):
            raise ValueError(expected("padding as numbers", repr(padding), "GatedConv2d"))
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, bias=False, **made
        )
        self.norm = nn.BatchNorm2d(out_channels, eps, momentum, affine=False, **made)
        self.beta = nn.Parameter(torch.zeros(out_channels, **made))
        self.rho = nn.Parameter(torch.ones(out_channels, **made))
        self.phi = nn.Parameter(torch.empty(out_channels, in_channels, **made))
        nn.init.kaiming_normal_(self.phi, nonlinearity="relu")
        self.subsample, self.beta_at, self.stats = subsample, beta_at, stats
        self.relu, self.execution = relu, execution
        self.compact_output = False
        self.full_channels = out_channels  # what the density is a share of
        self._last = _Last()
        self.set_density(density)

    # --- how many winners -------------------------------------------------------------------------

    def set_density(self, density: float) -> GatedConv2d:
        """Let k = ceil(density * K) channels win from now on.

        Raises:
            ValueError: if it is not in (0, 1].
        """
        if not 0 < density <= 1:
            raise ValueError(expected("a density in (0, 1]", density, "GatedConv2d"))
        self.density = float(density)
        return self

    @property
    def num_winners(self) -> int:
        """k; where channels were cut out, still the share of all there were."""
        return min(winners_of(self.density, self.full_channels), self.out_channels)

    def get_extra_state(self) -> Tensor:
        """Return density and `full_channels`, for the state_dict."""
        return torch.tensor([self.density, self.full_channels], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take what `get_extra_state` returned."""
        density, full = state.tolist()
        self.set_density(density)
        self.full_channels = int(full)

    @property
    def gate(self) -> Tensor | None:
        """g of the last forward, (N, K), before winners were taken; None before the first."""
        return self._last.gate

    # --- the layer --------------------------------------------------------------------------------

    def forward(self, input: Tensor | SampleChannels) -> Any:
        """Compute the winners of each sample."""
        x = SampleChannels.of(input)
        if x.values.dim() != 4 or x.num_channels != self.in_channels:
            what = f"(N, {self.in_channels}, H, W)"
            got = f"{tuple(x.values.shape)} of {x.num_channels} channels"
            raise ValueError(expected(what, got, "GatedConv2d"))
        whole = self._in_one_call(x.values)
        if whole is not None:
            return self._called(whole, x)
        # eq. 8; phi is He-initialised, so that fan-in is its dim 1
        g = F.linear(subsample(x, self.subsample), self.phi, self.rho).relu()
        self._last.gate = g
        idx, pi = self._winners(g)
        if self.execution == "mask":
            y = self._masked(x.dense(), idx, pi)
            return SampleChannels.of(y) if self.compact_output else y
        if self.training or torch.is_grad_enabled():
            y = self._activated(self._normalised(x, idx, pi), idx, pi)
        else:
            y = self._evaluated(x, idx, pi)
        out = SampleChannels(y, idx, self.out_channels, nonnegative=self.relu)
        return out if self.compact_output else out.dense()

    def _winners(self, g: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the winners (N, k) and pi there (eq. 6); None if all channels win."""
        if self.num_winners == self.out_channels:
            return None, g
        return k_winners(g, self.num_winners)

    def _activated(self, h: Tensor, idx: Tensor | None, pi: Tensor) -> Tensor:
        """Boost (or not) normalised winners, eq. 5."""
        beta = self.beta if idx is None else self.beta[idx]
        beta, factor = beta[..., None, None], pi[:, :, None, None]
        inside = self.beta_at == "inside"
        y = factor * (h + beta) if inside else factor * h + beta * (factor > 0)
        return y.relu() if self.relu else y

    # --- computing what exists --------------------------------------------------------------------

    def _normalised(self, x: SampleChannels, idx: Tensor | None, pi: Tensor) -> Tensor:
        """Convolve and normalise: (N, k, P, Q), winners only."""
        if not self.training:
            z, scale = self._convolved(x, idx), self._inverse_std()
            mean = self.norm.running_mean
            assert mean is not None
            if idx is not None:
                mean, scale = mean[idx], scale[idx]
            return (z - mean[..., None, None]) * scale[..., None, None]
        if self.stats == "active":
            z = self._convolved(x, idx)
            if idx is None:
                channels = torch.arange(z.shape[1], device=z.device)
                idx = channels.expand(z.shape[0], -1)
            return active_norm(z, idx, pi.detach() > 0, self.norm)
        # losers feed the statistics: every output channel is computed
        h: Tensor = self.norm(self._convolved(x, None))
        return h if idx is None else take_channels(h, idx)

    def _evaluated(self, x: SampleChannels, idx: Tensor | None, pi: Tensor) -> Tensor:
        """Evaluate without gradients: the norm is one factor and one summand of each channel."""
        norm = self.norm
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None and var is not None
        std = (var + norm.eps).sqrt_()
        factor = pi / (std if idx is None else std[idx])
        # pi ((z - mean) / std + beta) = pi / std (z + beta std - mean)
        if self.beta_at == "inside":
            y = self._convolved(x, idx, torch.addcmul(-mean, self.beta, std))
            if self.relu:
                y.relu_()  # before the factor, which is not negative
            return y.mul_(factor[:, :, None, None])
        beta = (self.beta if idx is None else self.beta[idx]) * (pi > 0)
        y = self._convolved(x, idx, -mean).mul_(factor[:, :, None, None])
        y.add_(beta[:, :, None, None])
        return y.relu_() if self.relu else y

    def _in_one_call(self, x: Tensor) -> ModuleType | None:
        """Return the backend that evaluates the whole layer at once, nobody looking on, if any."""
        plain = self.subsample == "l1" and self.beta_at == "inside" and self.execution == "sparse"
        if self.training or not plain or not direct(x):
            return None
        device = x.device
        if torch.is_autocast_enabled(device.type):
            return None
        chosen = backend.choose(device)
        gates = getattr(chosen, "gates", None)  # a rule, where a backend can
        return chosen if gates is not None and gates(x) else None

    def _called(self, whole: ModuleType, x: SampleChannels) -> Any:
        norm, k = self.norm, self.num_winners
        y, idx, self._last.gate = whole.gated_conv2d(
            x.values, x.idx, self.weight, self.phi, self.rho, self.beta, norm.running_mean,
            norm.running_var, norm.eps, k, self.stride, self.padding, self.dilation, self.relu,
        )  # fmt: skip
        out = SampleChannels(y, idx, self.out_channels, nonnegative=self.relu)
        return out if self.compact_output else out.dense()

    def _inverse_std(self) -> Tensor:
        assert self.norm.running_var is not None
        return (self.norm.running_var + self.norm.eps).rsqrt()

    def _convolved(
        self, x: SampleChannels, idx: Tensor | None, bias: Tensor | None = None
    ) -> Tensor:
        """Convolve channels that exist into ``idx`` (None: all)."""
        window: Any = (self.stride, self.padding, self.dilation)
        if self._skips(x, idx):
            return sample_conv2d(x.values, self.weight, bias, *window, in_idx=x.idx, out_idx=idx)
        assert idx is None
        return F.conv2d(x.dense(), self.weight, bias, *window)

    def _skips(self, x: SampleChannels, idx: Tensor | None) -> bool:
        """Whether to skip: always, but where only inputs can be and a dense layer is faster."""
        if idx is not None or x.idx is None:
            return idx is not None
        share = x.values.shape[1] / self.in_channels
        return share <= _INPUTS_WIN[_backend_name(x.values.device)]

    # --- the papers' baseline ---------------------------------------------------------------------

    def _masked(self, x: Tensor, idx: Tensor | None, pi: Tensor) -> Tensor:
        """Compute every channel and multiply losers by zero: (N, K, P, Q)."""
        z = F.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation)
        if idx is not None:
            pi = put_channels(pi, idx, self.out_channels)
        if self.training and self.stats == "active":
            every = torch.arange(z.shape[1], device=z.device).expand(z.shape[0], -1)
            h = active_norm(z, every, pi.detach() > 0, self.norm)
        else:
            h = self.norm(z)
        return self._activated(h, None, pi)

    def extra_repr(self) -> str:
        """Return the settings."""
        gate = f"density={self.density:g} ({self.num_winners} winners), stats={self.stats}"
        return f"{super().extra_repr()}, {gate}, beta {self.beta_at} the gate"


# torch.compile would follow how libraries are found
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _backend_name(device: torch.device) -> str:
    name: str = backend.choose(device).NAME
    return name


def gated_layers(model: nn.Module) -> Iterator[tuple[str, GatedConv2d]]:
    """Yield the gated convolutions of a model with their names, in order of definition."""
    for name, module in model.named_modules():
        if isinstance(module, GatedConv2d):
            yield name, module


def gate_penalty(model: nn.Module, factor: float = 1e-8) -> Tensor:
    """Return the Lasso on the gates of the last forward, to be added to the loss.

    ``factor`` times the sum over layers of the batch mean of sum_c g_c, losers included: it is
    their only gradient (section 3.4).

    Raises:
        ValueError: if the model has no gated layer, or one that has not run yet.
    """
    total: Tensor | None = None
    for name, layer in gated_layers(model):
        if layer.gate is None:
            raise ValueError(expected("a forward before gate_penalty", "none", name))
        term = layer.gate.sum(1).mean()
        total = term if total is None else total + term
    if total is None:
        raise ValueError(expected("a model with gated layers", type(model).__name__))
    return factor * total
