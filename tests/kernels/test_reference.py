"""The ATen kernels against indexing written out: bit-exact where nothing is computed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from channel_helpers import Wanted, channels, indices_of, slice_mask
from dcx_kernels.kernels import reference
from dcx_kernels.ops.grouping import active_groups
from tolerances import assert_close_to_float64, assert_exact

# shape, groups, out, in
SLICES = {
    "both": ((7, 5, 3, 3), 1, 3, 2),
    "out": ((7, 5, 3, 3), 1, 3, None),
    "in": ((7, 5, 3, 3), 1, None, 2),
    "one": ((7, 5, 3, 3), 1, 1, 1),
    "all-listed": ((3, 17, 1, 1), 1, 3, 17),
    "none": ((7, 5, 3, 3), 1, None, None),
    "C1": ((1, 1, 3, 1), 1, 1, 1),
    "linear": ((63, 100), 1, 17, 3),
    "linear-inner": ((6, 8, 4), 1, 2, 5),
    "vector": ((9,), 1, 4, None),
    "groups": ((6, 2, 3, 3), 3, [0, 3, 5], [1, 2, 4]),
    "groups-gone": ((8, 3, 1, 2), 4, [0, 1, 4, 5], [0, 2, 7, 8]),
    "groups-out": ((6, 2, 3, 3), 3, [0, 3, 5], None),
    "groups-in": ((6, 2, 3, 3), 3, None, [1, 2, 4]),
    "depthwise": ((9, 1, 3, 3), 9, [1, 4, 8], [1, 4, 8]),
    "multiplier-2": ((8, 1, 3, 3), 4, [0, 1, 6, 7], [0, 3]),
}


def _lists(
    shape: Sequence[int], groups: int, out: Wanted, in_: Wanted
) -> tuple[Tensor | None, Tensor | None, int, Tensor]:
    out_active = channels(out, shape[0])
    in_active = channels(in_, shape[1] * groups) if len(shape) > 1 else None
    if len(shape) == 1:
        mask = torch.zeros(shape, dtype=torch.bool)
        mask[indices_of(out_active, shape[0])] = True
    else:
        mask = slice_mask(shape, in_active, out_active, groups)
    return (
        None if out_active is None else out_active.indices,
        None if in_active is None else in_active.indices,
        active_groups(groups, in_active, out_active),
        mask,
    )


@pytest.mark.parametrize(("shape", "groups", "out", "in_"), SLICES.values(), ids=SLICES.keys())
def test_pack_equals_indexing(shape: Sequence[int], groups: int, out: Wanted, in_: Wanted) -> None:
    out_idx, in_idx, existing, mask = _lists(shape, groups, out, in_)
    weight = torch.randn(*shape)
    before = weight.clone()
    packed = reference.pack(weight, out_idx, in_idx, groups, existing)
    rows = shape[0] if out_idx is None else len(out_idx)
    assert packed.shape[0] == rows
    if len(shape) > 1:
        expected = shape[1] if in_idx is None else len(in_idx) // existing
        assert tuple(packed.shape) == (rows, expected, *shape[2:])
    assert_exact(packed.flatten(), weight[mask])
    assert packed.is_contiguous() and packed.data_ptr() != weight.data_ptr()
    assert_exact(weight, before)


@pytest.mark.parametrize(("shape", "groups", "out", "in_"), SLICES.values(), ids=SLICES.keys())
def test_unpack_transposes_pack(
    shape: Sequence[int], groups: int, out: Wanted, in_: Wanted
) -> None:
    out_idx, in_idx, existing, mask = _lists(shape, groups, out, in_)
    weight = torch.randn(*shape)
    packed = reference.pack(weight, out_idx, in_idx, groups, existing)
    dense = reference.unpack(packed, shape, out_idx, in_idx, groups, existing)
    assert_exact(dense, torch.where(mask, weight, 0.0))


def test_pack_reads_a_non_contiguous_weight() -> None:
    weight = torch.randn(4, 6, 3, 3).contiguous(memory_format=torch.channels_last)
    out, in_ = torch.tensor([1, 3]), torch.tensor([0, 2, 5])
    assert_exact(reference.pack(weight, out, in_), weight[out][:, in_])


def test_gather_rows_writes_into_out() -> None:
    dense, rows = torch.randn(6, 4), torch.tensor([1, 5])
    storage = torch.full((8,), float("nan"))
    gathered = reference.gather_rows(dense, rows, 4, storage)
    assert gathered.data_ptr() == storage.data_ptr()
    assert_exact(gathered, dense[rows])


def test_scatter_rows_leaves_the_rest_bitwise() -> None:
    dense = torch.randn(6, 4)
    before, rows, packed = dense.clone(), torch.tensor([1, 5]), torch.randn(2, 4)
    reference.scatter_rows_(dense, packed, rows, 4)
    assert_exact(dense[rows], packed)
    rest = torch.tensor([0, 2, 3, 4])
    assert_exact(dense[rest], before[rest])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_channel_batch_norm_fwd_returns_statistics(training: bool, dtype: torch.dtype) -> None:
    x = torch.randn(4, 3, 5, 2, dtype=torch.float64).to(dtype)
    accumulate = torch.promote_types(dtype, torch.float32)
    mean, var = torch.randn(5, dtype=accumulate), torch.rand(5, dtype=accumulate) + 0.5
    active, eps = torch.tensor([0, 2, 3]), 0.1
    truth = x.double()
    over = (0, 2, 3)
    wanted_mean = truth.mean(over) if training else mean[active].double()
    wanted_var = truth.var(over, unbiased=False) if training else var[active].double()
    wanted_invstd = (wanted_var + eps).rsqrt()
    _, got_mean, got_invstd = reference.channel_batch_norm_fwd(
        x, None, None, mean, var, active, training, 0.1, eps, False
    )
    assert got_mean.dtype == accumulate and got_invstd.dtype == accumulate
    for name, got, wanted in (
        ("mean", got_mean, wanted_mean),
        ("invstd", got_invstd, wanted_invstd),
    ):
        assert_close_to_float64(got, wanted.to(accumulate), wanted, name)
