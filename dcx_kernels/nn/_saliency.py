"""How a layer measures the saliency of its channels: from probes that backward fills."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dcx_kernels.channel_set import mark_any_length
from dcx_kernels.errors import expected
from dcx_kernels.nn._forward import Forward, Probe

__all__ = ["Forward", "Reduction", "SaliencyMeter"]

Reduction = Literal["batch", "sample"]


class SaliencyMeter:
    """Signed sums of (dL/dh) h of one layer's channels over the backward passes since `reset`.

    Both reductions of DCE eq. 2 and DCP eq. 7 are means of (dL/dh) h; they differ in what stands
    inside the absolute value: ``batch`` |mean over batch and pixels|, ``sample`` mean over batch of
    |mean over pixels|.

    Attributes:
        signed: (k,), the sum over batch and pixels, or None before the first backward.
        elements: N * P * Q, the elements summed.
        samples: forward -> (N, k), the sums over pixels of each sample (``sample`` only).
        pixels: forward -> P * Q.
    """

    def __init__(self, forward: Forward | None = None) -> None:
        self.forward = forward
        self.reset()

    def reset(self) -> None:
        """Forget what was measured; called whenever the active set changes."""
        self.signed: Tensor | None = None
        self.elements = 0
        self.samples: dict[int, Tensor] = {}
        self.pixels: dict[int, int] = {}
        self._calls = 0

    def probe(self, samples: int, num_active: int, like: Tensor, reduction: Reduction) -> Probe:
        """Return zeros for an operator's ``probe``: (k,) for ``batch``, (N, k) for ``sample``.

        When backward fills their gradient, the signed sums are added up here.

        Args:
            samples: N.
            num_active: k.
            like: a tensor of the layer; gives device and dtype.
        """
        shape = (num_active,) if reduction == "batch" else (samples, num_active)
        dtype = torch.promote_types(like.dtype, torch.float32)
        zeros = torch.zeros(shape, dtype=dtype, device=like.device)
        mark_any_length(zeros, len(shape) - 1)
        zeros.requires_grad_()
        probe, forward = Probe(zeros), self._number()

        def add(leaf: Tensor) -> None:
            assert leaf.grad is not None
            signed, leaf.grad = leaf.grad, None
            self.add(signed, samples, probe.pixels, forward)

        zeros.register_post_accumulate_grad_hook(add)
        return probe

    def _number(self) -> int:
        """Return the number of this forward; a layer of its own takes every call for one."""
        if self.forward is not None:
            return self.forward.number
        self._calls += 1
        return self._calls

    def add(
        self, signed: Tensor, samples: int, pixels: Sequence[int], forward: int | None = None
    ) -> None:
        """Add the signed sums of one backward pass, (k,) or (N, k).

        Args:
            pixels: P * Q of every call that the sums are over: a layer may be called twice.
        """
        forward = self._number() if forward is None else forward
        if signed.dim() == 2:
            earlier = self.samples.get(forward)
            self.samples[forward] = signed if earlier is None else earlier + signed
            self.pixels.setdefault(forward, pixels[0])
            signed = signed.sum(0)
        self.signed = signed if self.signed is None else self.signed + signed
        self.elements += samples * sum(pixels)

    def read(self, reduction: Reduction) -> Tensor | None:
        """Return the saliency of this layer alone, (k,), or None before the first backward.

        Raises:
            ValueError: if ``sample`` was not measured.
        """
        check_reduction(reduction)
        if self.signed is None:
            return None
        if reduction == "batch":
            return (self.signed / self.elements).abs()
        return mean_over_samples(self.samples, self.pixels)

    def __deepcopy__(self, memo: dict[int, object]) -> SaliencyMeter:
        return SaliencyMeter(None if self.forward is None else self.forward.__deepcopy__(memo))

    def __getstate__(self) -> dict[str, object]:
        return SaliencyMeter().__dict__


def check_reduction(reduction: str) -> None:
    """Refuse anything but the two reductions."""
    if reduction not in ("batch", "sample"):
        raise ValueError(expected("reduction 'batch' or 'sample'", repr(reduction)))


def mean_over_samples(samples: dict[int, Tensor], pixels: dict[int, int]) -> Tensor:
    """Return the mean over all samples of |mean over pixels|, (k,).

    Raises:
        ValueError: if nothing was measured sample by sample.
    """
    if not samples:
        what = "saliency_reduction = 'sample' to be set before backward"
        raise ValueError(expected(what, "'batch'"))
    total = sum((s.abs().sum(0) / pixels[f] for f, s in samples.items()), start=torch.zeros(()))
    return torch.as_tensor(total) / sum(s.shape[0] for s in samples.values())
