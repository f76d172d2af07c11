"""Raw operators of convolutions between norms; for their tensors see `kernels.reference.fused`.

A `Norm` is three tensors in a schema, a `NormGrad` six and a flag.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcx_kernels.kernels import backend
from dcx_kernels.kernels.norm import Norm, NormGrad
from dcx_kernels.ops._conv import count_macs, fake_output, groups_in
from dcx_kernels.ops._library import register

__all__ = [
    "as_norm",
    "flat_grad",
    "fused_conv2d_dgrad",
    "fused_conv2d_fwd",
    "fused_conv2d_wgrad",
    "norm_act_bwd",
    "norm_act_fwd",
    "norm_fold",
    "norm_fold_bwd",
]

_Vector = Tensor | None
FlatGrad = tuple[_Vector, _Vector, _Vector, _Vector, _Vector, _Vector, bool]


def as_norm(scale: Tensor | None, center: Tensor | None, shift: Tensor | None) -> Norm | None:
    """Return the norm of three vectors, or None if there are none."""
    if scale is None:
        return None
    assert center is not None and shift is not None
    return Norm(scale, center, shift)


def flat_grad(grad: NormGrad | None) -> FlatGrad:
    """Return a gradient's tensors as schemas have them: y, center, slope, offset, scale, shift."""
    if grad is None:
        return None, None, None, None, None, None, False
    scale, shift = (None, None) if grad.norm is None else (grad.norm.scale, grad.norm.shift)
    return grad.y, grad.center, grad.slope, grad.offset, scale, shift, grad.relu


def _as_grad(
    y: Tensor | None,
    center: Tensor | None,
    slope: Tensor | None,
    offset: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
) -> NormGrad | None:
    if y is None:
        return None
    assert center is not None and slope is not None and offset is not None
    return NormGrad(y, center, slope, offset, as_norm(scale, center, shift), relu)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _vector(like: Tensor, *shape: Any) -> Tensor:
    return like.new_empty(shape, dtype=_accumulator(like))


# --- convolution ----------------------------------------------------------------------------------


def _fwd(
    x: Tensor, scale: Tensor | None, center: Tensor | None, shift: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *args_, active, statistics = args
    out: tuple[Tensor, Tensor, Tensor] = backend.choose(x.device).fused_conv2d_fwd(
        x, as_norm(scale, center, shift), *args_, groups_in(active, x), statistics
    )
    return out


def _fused_fwd_fake(
    x: Tensor, scale: Any, center: Any, shift: Any, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *args_, statistics = args
    y = fake_output(x, *args_)
    channels = y.shape[1] if statistics else 0
    return y, _vector(y, channels), _vector(y, channels)


def _dgrad(dy: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, scale, center, shift, *args_, active, per_sample = args[7:]
    out: tuple[Tensor, Tensor, Tensor] = backend.choose(x.device).fused_conv2d_dgrad(
        dy, _as_grad(*args[:7]), x, as_norm(scale, center, shift), *args_, groups_in(active, x),
        per_sample,
    )  # fmt: skip
    return out


def _dgrad_fake(dy: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, scale, per_sample = args[7], args[8], args[-1]
    shape: tuple[Any, ...] = (0,)
    if scale is not None:
        shape = (x.shape[0], x.shape[1]) if per_sample else (x.shape[1],)
    return torch.empty_like(x), _vector(x, *shape), _vector(x, *shape)


def _wgrad(dy: Tensor, *args: Any) -> Tensor:
    x, scale, center, shift, *args_, active = args[7:]
    dw: Tensor = backend.choose(x.device).fused_conv2d_wgrad(
        dy, _as_grad(*args[:7]), x, as_norm(scale, center, shift), *args_, groups_in(active, x)
    )
    return dw.contiguous()  # as weights are, whatever the layout of x


def _wgrad_fake(dy: Tensor, *args: Any) -> Tensor:
    x, kernel_size, active = args[7], args[11], args[-1]
    shape = (dy.shape[1], x.shape[1] // groups_in(active, x), *kernel_size)
    dw: Tensor = x.new_empty(shape)
    return dw


def _fwd_flops(x: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
    return 2 * count_macs(out_shape[0], x[1], args[3][2:], args[-2])


def _dgrad_flops(dy: Any, *args: Any, **_: Any) -> int:
    return 2 * count_macs(dy, args[7][1], args[11][2:], args[-2])


def _wgrad_flops(dy: Any, *args: Any, **_: Any) -> int:
    return 2 * count_macs(dy, args[7][1], args[11], args[-1])


_NORM = "Tensor? x_scale, Tensor? x_center, Tensor? x_shift"
_GRAD = (
    "Tensor? y, Tensor? center, Tensor? slope, Tensor? offset, Tensor? scale, Tensor? shift,"
    " bool relu"
)
_GEOMETRY = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation"
_LISTS = "Tensor? in_idx, Tensor? out_idx"
fused_conv2d_fwd = register(
    f"fused_conv2d_fwd(Tensor x, {_NORM}, Tensor weight, Tensor? bias, {_LISTS}, {_GEOMETRY},"
    " int groups, int active_groups, bool statistics) -> (Tensor, Tensor, Tensor)",
    _fwd,
    _fused_fwd_fake,
    _fwd_flops,
)
fused_conv2d_dgrad = register(
    f"fused_conv2d_dgrad(Tensor dy, {_GRAD}, Tensor x, {_NORM}, Tensor weight, {_LISTS},"
    f" {_GEOMETRY}, int groups, int active_groups, bool per_sample) -> (Tensor, Tensor, Tensor)",
    _dgrad,
    _dgrad_fake,
    _dgrad_flops,
)
fused_conv2d_wgrad = register(
    f"fused_conv2d_wgrad(Tensor dy, {_GRAD}, Tensor x, {_NORM}, SymInt[2] kernel_size,"
    f" {_GEOMETRY}, int active_groups) -> Tensor",
    _wgrad,
    _wgrad_fake,
    _wgrad_flops,
)


# --- norm -----------------------------------------------------------------------------------------


def _act_fwd(y: Tensor, scale: Tensor, center: Tensor, shift: Tensor, relu: bool) -> Tensor:
    z: Tensor = backend.choose(y.device).norm_act_fwd(y, Norm(scale, center, shift), relu)
    return z


def _act_fwd_fake(y: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(y)


def _act_bwd(
    dz: Tensor,
    y: Tensor,
    scale: Tensor,
    center: Tensor,
    shift: Tensor,
    relu: bool,
    per_sample: bool,
) -> tuple[Tensor, Tensor]:
    norm, kernel = Norm(scale, center, shift), backend.choose(y.device).norm_act_bwd
    sums: tuple[Tensor, Tensor] = kernel(dz, y, norm, relu, per_sample)
    return sums


def _act_bwd_fake(dz: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    shape = y.shape[:2] if args[-1] else y.shape[1:2]
    return _vector(y, *shape), _vector(y, *shape)


def _fold(mean: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    vectors: tuple[Tensor, Tensor, Tensor, Tensor] = backend.choose(mean.device).norm_fold(
        mean, *args
    )
    return vectors


def _fold_fake(
    mean: Tensor,
    m2: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    active: Tensor | None,
    count: int,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if training:
        channels = mean.shape[0]
    else:
        assert running_mean is not None
        channels = running_mean.shape[0] if active is None else active.shape[0]
    vectors = [mean.new_empty(channels) for _ in range(4)]
    return vectors[0], vectors[1], vectors[2], vectors[3]


def _fold_bwd(dscale: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    grads = backend.choose(dscale.device).norm_fold_bwd(dscale, *args)
    return grads


def _fold_bwd_fake(
    dscale: Tensor, dshift: Tensor, scale: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = [torch.empty_like(scale) for _ in range(4)]
    return grads[0], grads[1], grads[2], grads[3], dscale.new_empty(dscale.shape)


def _no_flops(*args: Any, **kwargs: Any) -> int:
    return 0  # as torch counts its own batch norm: multiply-accumulates of matrices only


norm_act_fwd = register(
    "norm_act_fwd(Tensor y, Tensor scale, Tensor center, Tensor shift, bool relu) -> Tensor",
    _act_fwd,
    _act_fwd_fake,
    _no_flops,
)
norm_act_bwd = register(
    "norm_act_bwd(Tensor dz, Tensor y, Tensor scale, Tensor center, Tensor shift, bool relu,"
    " bool per_sample) -> (Tensor, Tensor)",
    _act_bwd,
    _act_bwd_fake,
    _no_flops,
)
norm_fold = register(
    "norm_fold(Tensor mean, Tensor m2, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, Tensor? active, SymInt count, bool training, float momentum,"
    " float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _fold,
    _fold_fake,
    _no_flops,
)
norm_fold_bwd = register(
    "norm_fold_bwd(Tensor dscale, Tensor dshift, Tensor scale, Tensor shift, Tensor invstd,"
    " SymInt count, bool training) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fold_bwd,
    _fold_bwd_fake,
    _no_flops,
)
