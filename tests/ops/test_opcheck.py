"""Every raw operator: torch's opcheck, strides of its fake, FLOP count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from channel_helpers import channels, leaf
from dcx_kernels import (
    channel_batch_norm,
    channel_conv2d,
    channel_linear,
    gather_channels,
    scatter_channels,
)

OPS = torch.ops.dcx_kernels
LAST = torch.channels_last


def _x(*shape: int, last: bool = False) -> Tensor:
    x = torch.randn(*shape)
    return x.contiguous(memory_format=LAST) if last else x


def _idx(*indices: int) -> Tensor:
    return torch.tensor(indices)


ONE, TWO = [1, 1], [2, 2]
A, B, ONLY = _idx(0, 2, 3), _idx(1, 4), _idx(2)

SAMPLES: dict[str, tuple[Any, tuple[Any, ...]]] = {}
# have opcheck in files of their own: test_fused_conv2d, test_sample_conv2d, ...
ELSEWHERE = ("fused_", "norm_", "sample_", "k_winners", "select_channels")


def _sample(op: Any, name: str, *args: Any) -> None:
    SAMPLES[f"{op._qualified_op_name.split('::')[1]}-{name}"] = (op.default, args)


for _name, _n, _last in (("plain", 2, False), ("channels_last", 2, True), ("empty", 0, False)):
    _geometry = (TWO, ONE, ONE, 1, 1)
    _full = _x(6, 5, 3, 3)
    _sample(
        OPS.channel_conv2d_fwd, _name, _x(_n, 3, 6, 5, last=_last), _full, _x(6), A, B, *_geometry
    )
    _sample(
        OPS.channel_conv2d_dgrad, _name, _x(_n, 2, 3, 3, last=_last), _x(_n, 3, 6, 5, last=_last),
        _full, A, B, *_geometry,
    )  # fmt: skip
    _sample(
        OPS.channel_conv2d_wgrad, _name, _x(_n, 2, 3, 3, last=_last), _x(_n, 3, 6, 5, last=_last),
        [3, 3], TWO, ONE, ONE, 1,
    )  # fmt: skip
for _name, _channels_in, _in, _out, _bias in (
    ("no-bias", 3, A, B, None),
    ("width-1", 1, ONLY, ONLY, _x(6)),
    ("in-only", 3, A, None, _x(6)),
    ("out-only", 5, None, B, _x(6)),
    ("packed", 5, None, None, _x(6)),
):
    _plain = (ONE, ONE, TWO, 1, 1)
    _out_count = 6 if _out is None else len(_out)
    _sample(
        OPS.channel_conv2d_fwd, _name, _x(2, _channels_in, 6, 5), _x(6, 5, 3, 3), _bias, _in, _out,
        *_plain,
    )  # fmt: skip
    _sample(
        OPS.channel_conv2d_dgrad, _name, _x(2, _out_count, 4, 3), _x(2, _channels_in, 6, 5),
        _x(6, 5, 3, 3), _in, _out, *_plain,
    )  # fmt: skip
for _name, _a_last, _b_last in (
    ("plain", False, False), ("last", True, True), ("mixed", False, True), ("mixed-2", True, False)
):  # fmt: skip
    _sample(
        OPS.channel_union_add, _name, _x(2, 3, 4, 5, last=_a_last), _x(2, 2, 4, 5, last=_b_last),
        _idx(0, 2, 3), _idx(1, 3), 4,
    )  # fmt: skip
_sample(OPS.channel_union_add, "features", _x(2, 3), _x(2, 4), _idx(0, 2, 3), _idx(0, 1, 2, 3), 4)
_sample(OPS.channel_union_add, "empty", _x(0, 1, 2, 2), _x(0, 2, 2, 2), _idx(1), _idx(0, 2), 3)
_grouped = (ONE, [0, 0], ONE, 3, 2)
_g_in, _g_out = _idx(1, 5), _idx(0, 2, 6, 8)
_sample(
    OPS.channel_conv2d_fwd,
    "groups",
    _x(2, 2, 6, 5),
    _x(9, 2, 3, 3),
    _x(9),
    _g_in,
    _g_out,
    *_grouped,
)
_sample(
    OPS.channel_conv2d_dgrad, "groups", _x(2, 4, 4, 3), _x(2, 2, 6, 5), _x(9, 2, 3, 3), _g_in,
    _g_out, *_grouped,
)  # fmt: skip
_sample(
    OPS.channel_conv2d_wgrad, "groups", _x(2, 4, 4, 3), _x(2, 2, 6, 5), [3, 3], ONE, [0, 0], ONE, 2
)
_sample(
    OPS.channel_conv2d_wgrad, "width-1", _x(2, 1, 4, 3), _x(2, 1, 6, 5), [3, 3], ONE, [0, 0], ONE, 1
)
for _name, _shape, _in, _out, _inner, _bias in (
    ("plain", (3, 12), A, B, 4, _x(6)),
    ("no-bias", (3, 12), A, B, 4, None),
    ("width-1", (3, 4), ONLY, ONLY, 4, _x(6)),
    ("empty", (0, 12), A, B, 4, _x(6)),
    ("three-axes", (2, 3, 20), None, B, 4, _x(6)),
    ("packed", (3, 20), None, None, 4, _x(6)),
):
    _rows = 6 if _out is None else len(_out)
    _sample(OPS.channel_linear_fwd, _name, _x(*_shape), _x(6, 20), _bias, _in, _out, _inner)
    _sample(OPS.channel_linear_dgrad, _name, _x(*_shape[:-1], _rows), _x(6, 20), _in, _out, _inner)
    _sample(OPS.channel_linear_wgrad, _name, _x(*_shape[:-1], _rows), _x(*_shape))
for _name, _shape, _last, _training, _affine in (
    ("train", (4, 3, 5, 2), False, True, True),
    ("train-channels_last", (4, 3, 5, 2), True, True, True),
    ("train-no-affine", (4, 3, 5, 2), False, True, False),
    ("train-width-1", (4, 1, 5, 2), False, True, True),
    ("train-empty", (0, 3, 5, 2), False, True, True),
    ("eval", (4, 3, 5, 2), False, False, True),
    ("eval-no-affine", (4, 3, 5, 2), False, False, False),
):
    _k = _shape[1]
    _w, _b = (_x(_k), _x(_k)) if _affine else (None, None)
    _list = A if _k == 3 else ONLY
    _xs = _x(*_shape, last=_last)
    _sample(
        OPS.channel_batch_norm_fwd, _name, _xs, _w, _b, _x(5), _x(5).exp(), _list, _training,
        0.1, 1e-5, _affine,
    )  # fmt: skip
    _sample(
        OPS.channel_batch_norm_bwd, _name, _x(*_shape, last=_last), _xs,
        _xs.relu() if _last else None, _w, _b, _x(_k), _x(_k).exp(), _training, 1e-5, not _affine,
    )  # fmt: skip
_sample(
    OPS.channel_batch_norm_fwd, "train-all", _x(4, 5, 3, 2), _x(5), _x(5), _x(5), _x(5).exp(), None,
    True, 0.1, 1e-5, True,
)  # fmt: skip
_sample(
    OPS.channel_batch_norm_fwd, "train-no-statistics", _x(4, 3, 3, 2), None, None, None, None, A,
    True, 0.1, 1e-5, False,
)  # fmt: skip
for _name, _xs, _dim in (
    ("NCHW", _x(2, 5, 4, 3), 1),
    ("channels_last", _x(2, 5, 4, 3, last=True), 1),
    ("CHW", _x(5, 4, 3), 0),
    ("last", _x(2, 4, 5), -1),
    ("empty", _x(0, 5, 4, 3), 1),
):
    _sample(OPS.channel_gather, _name, _xs, A, _dim)
    _sample(OPS.channel_scatter, _name, _xs, _idx(0, 2, 3, 5, 8), _dim, 9)
_sample(OPS.channel_gather, "width-1", _x(2, 5, 4, 3), ONLY, 1)
for _name, _shape, _in, _out, _groups, _active in (
    ("both", (6, 5, 3, 3), A, B, 1, 1),
    ("in", (6, 5, 3, 3), A, None, 1, 1),
    ("out", (6, 5, 3, 3), None, B, 1, 1),
    ("width-1", (6, 5, 3, 3), ONLY, ONLY, 1, 1),
    ("vector", (6,), None, B, 1, 1),
    ("inner", (6, 5, 4), A, B, 1, 1),
    ("groups", (9, 2, 3, 3), _g_in, _g_out, 3, 2),
):
    _packed = OPS.pack_weight(_x(*_shape), _out, _in, _groups, _active)
    _sample(OPS.pack_weight, _name, _x(*_shape), _out, _in, _groups, _active)
    _sample(OPS.unpack_weight, _name, _packed, list(_shape), _out, _in, _groups, _active)


@pytest.mark.parametrize(("op", "args"), SAMPLES.values(), ids=SAMPLES.keys())
def test_raw_operator_passes_opcheck(op: Any, args: tuple[Any, ...]) -> None:
    results = torch.library.opcheck(op, args)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4  # schema, autograd registration, fake tensors, compiled dispatch


@pytest.mark.parametrize(("op", "args"), SAMPLES.values(), ids=SAMPLES.keys())
def test_fake_predicts_the_strides(op: Any, args: tuple[Any, ...]) -> None:
    real = op(*args)
    mode = FakeTensorMode()
    with mode:
        fake = op(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args])
    for got, wanted in zip(_as_tuple(fake), _as_tuple(real), strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        long = [axis for axis, size in enumerate(wanted.shape) if size > 1]
        if wanted.numel():
            assert [got.stride(a) for a in long] == [wanted.stride(a) for a in long]


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def test_every_raw_operator_has_samples() -> None:
    registered = {
        schema.name.split("::")[1]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("dcx_kernels::")
    }
    here = {name.split("-")[0] for name in SAMPLES}
    assert registered - here == {name for name in registered if name.startswith(ELSEWHERE)}


# --- FLOPs ----------------------------------------------------------------------------------------


def _count(y: Tensor) -> int:
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return backward.get_total_flops()


@pytest.mark.parametrize(
    ("in_", "out", "groups", "stride", "macs"),
    [
        ([0, 2, 3], [1, 4], 1, 1, 2 * (2 * 4 * 3) * 3 * 9),  # N (k P Q) c R S
        ([5], [4], 1, 1, 2 * (1 * 4 * 3) * 1 * 9),
        (None, [1, 4], 1, 1, 2 * (2 * 4 * 3) * 6 * 9),
        ([0, 2, 3], None, 1, 2, 2 * (9 * 2 * 2) * 3 * 9),
        ([1, 5], [0, 2, 6, 8], 3, 1, 2 * (4 * 4 * 3) * 1 * 9),
    ],
    ids=["both", "width-1", "out-only", "in-only-stride-2", "groups"],
)
def test_channel_conv2d_counts_active_macs(
    in_: Any, out: Any, groups: int, stride: int, macs: int
) -> None:
    in_active, out_active = channels(in_, 6), channels(out, 9)
    c = 6 if in_active is None else len(in_active)
    k = 9 if out_active is None else len(out_active)
    existing = 2 if groups == 3 else 1
    x, thin_x = leaf(torch.randn(2, c, 6, 5)), leaf(torch.randn(2, c, 6, 5))
    weight, thin = (
        leaf(torch.randn(9, 6 // groups, 3, 3)),
        leaf(torch.randn(k, c // existing, 3, 3)),
    )
    with FlopCounterMode(display=False) as forward:
        y = channel_conv2d(
            x, weight, None, stride, groups=groups, in_active=in_active, out_active=out_active
        )
    with FlopCounterMode(display=False) as thin_forward:
        thin_y = F.conv2d(thin_x, thin, None, stride, groups=existing)
    assert forward.get_total_flops() == 2 * macs == thin_forward.get_total_flops()
    assert _count(y) == 4 * macs  # dgrad and wgrad
    if groups == 1:  # torch counts the weight gradient of a grouped convolution as if it were dense
        assert _count(thin_y) == 4 * macs


@pytest.mark.parametrize(("in_", "out"), [([0, 2], [1, 4, 5]), ([3], [0]), (None, [2])])
@pytest.mark.parametrize("batch", [(3,), (2, 3)], ids=str)
def test_channel_linear_counts_active_macs(in_: Any, out: Any, batch: tuple[int, ...]) -> None:
    in_active, out_active = channels(in_, 5), channels(out, 6)
    c, k = (5 if in_active is None else len(in_active)) * 4, len(out_active)
    rows = torch.Size(batch).numel()
    x, thin_x = leaf(torch.randn(*batch, c)), leaf(torch.randn(*batch, c))
    weight, thin = leaf(torch.randn(6, 20)), leaf(torch.randn(k, c))
    with FlopCounterMode(display=False) as forward:
        y = channel_linear(x, weight, in_active=in_active, out_active=out_active, inner=4)
    with FlopCounterMode(display=False) as thin_forward:
        thin_y = F.linear(thin_x, thin)
    assert forward.get_total_flops() == 2 * rows * c * k == thin_forward.get_total_flops()
    assert _count(y) == 4 * rows * c * k == _count(thin_y)


def test_what_moves_or_normalises_counts_nothing() -> None:
    active = channels([0, 2], 4)
    with FlopCounterMode(display=False) as counter:
        x = gather_channels(torch.randn(3, 4, 2, 2, requires_grad=True), active)
        y = channel_batch_norm(x, None, None, training=True, active=active)
        scatter_channels(y, active).sum().backward()
    assert counter.get_total_flops() == 0
