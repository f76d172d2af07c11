"""How a layer measures the saliency of its channels: from probes that backward fills."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dcx_kernels.errors import expected

__all__ = ["Reduction", "SaliencyMeter"]

Reduction = Literal["batch", "sample"]


class SaliencyMeter:
    """Saliency of one layer's channels, summed over the backward passes since the last `reset`.

    Both reductions of DCE eq. 2 and DCP eq. 7 are means of (dL/dh) h; they differ in what stands
    inside the
    absolute value: ``batch`` |mean over batch and pixels|, ``sample`` mean over batch of |mean over
        pixels|.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what was measured; called whenever the active set changes."""
        self._signed: Tensor | None = None
        self._absolute: Tensor | None = None
        self._elements = 0
        self._samples = 0

    def probe(self, x: Tensor, num_active: int, pixels: int, reduction: Reduction) -> Tensor:
        """Return zeros for an operator's ``probe``: (k,) for ``batch``, (N, k) for ``sample``.

        When backward fills its gradient, the signed sums are added up here.

        Args:
            x: the layer's input; gives batch size and device.
            pixels: P * Q of the layer's output.
        """
        samples = x.shape[0]
        shape = (num_active,) if reduction == "batch" else (samples, num_active)
        dtype = torch.promote_types(x.dtype, torch.float32)
        leaf = torch.zeros(shape, dtype=dtype, device=x.device, requires_grad=True)
        leaf.register_post_accumulate_grad_hook(lambda probe: self._add(probe, samples, pixels))
        return leaf

    def add_signed(self, signed: Tensor, pixels: int) -> None:
        """Add the signed sums over pixels of (dL/dh) h, (N, K), of one backward pass."""
        self._add_sums(signed.sum(0), signed.abs().sum(0), signed.shape[0], pixels)

    def _add(self, probe: Tensor, samples: int, pixels: int) -> None:
        assert probe.grad is not None
        signed, probe.grad = probe.grad, None
        if signed.dim() == 2:
            self._add_sums(signed.sum(0), signed.abs().sum(0), samples, pixels)
        else:
            self._add_sums(signed, None, samples, pixels)

    def _add_sums(self, signed: Tensor, absolute: Tensor | None, samples: int, pixels: int) -> None:
        self._signed = signed if self._signed is None else self._signed + signed
        self._elements += samples * pixels
        if absolute is not None:
            absolute = absolute / pixels
            self._absolute = absolute if self._absolute is None else self._absolute + absolute
            self._samples += samples

    def read(self, reduction: Reduction) -> Tensor | None:
        """Return the saliency, (num_active,), or None before the first backward.

        Raises:
            ValueError: if ``sample`` was not measured.
        """
        if reduction not in ("batch", "sample"):
            raise ValueError(expected("reduction 'batch' or 'sample'", repr(reduction)))
        if self._signed is None:
            return None
        if reduction == "batch":
            return (self._signed / self._elements).abs()
        if self._absolute is None:
            what = "saliency_reduction = 'sample' to be set before backward"
            raise ValueError(expected(what, "'batch'"))
        return self._absolute / self._samples

    def __deepcopy__(self, memo: object) -> SaliencyMeter:
        return SaliencyMeter()

    def __getstate__(self) -> dict[str, object]:
        return SaliencyMeter().__dict__
