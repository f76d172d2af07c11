"""Optimizers that touch active slices only; `torch.optim.Optimizer`s in every other respect."""

from dcx_kernels.optim.adamw import AdamW
from dcx_kernels.optim.amp import scaled_step
from dcx_kernels.optim.clip import clip_grad_norm_
from dcx_kernels.optim.sgd import SGD

__all__ = ["SGD", "AdamW", "clip_grad_norm_", "scaled_step"]
