"""ParameterSlot: packed leaves hold the slice, their gradients are the slice of the dense one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from channel_helpers import Wanted, channels, leaf, masked_conv2d, slice_mask
from dcx_kernels import ChannelSet, channel_conv2d
from dcx_kernels.ops.slot import ParameterSlot, pack_leaves, parameter_slots
from tolerances import assert_exact, assert_gradients_close

# shape, groups, inner, out, in
SLICES: dict[str, tuple[tuple[int, ...], int, int, Wanted, Wanted]] = {
    "conv": ((6, 5, 3, 3), 1, 1, 3, 2),
    "out-only": ((6, 5, 3, 3), 1, 1, 3, None),
    "in-only": ((6, 5, 3, 3), 1, 1, None, 2),
    "one": ((6, 5, 1, 1), 1, 1, 1, 1),
    "vector": ((9,), 1, 1, 4, None),
    "grouped": ((9, 2, 3, 3), 3, 1, [0, 2, 6, 8], [1, 5]),
    "depthwise": ((17, 1, 3, 3), 17, 1, [0, 3, 16], [0, 3, 16]),
    "linear": ((6, 20), 1, 1, 2, 7),
    "linear-inner": ((6, 20), 1, 4, 2, 3),
    "linear-inner-out": ((6, 20), 1, 4, 2, None),
}


def _slot(
    shape: tuple[int, ...], groups: int, inner: int, out: Wanted, in_: Wanted
) -> tuple[ParameterSlot, Tensor]:
    """Return a compact slot with sets and the mask of its active slice."""
    slot = ParameterSlot(nn.Parameter(torch.randn(shape)), groups, inner)
    slot.compact = True
    out_active = channels(out, shape[0])
    if len(shape) == 1:
        slot.set_active(out_active)
        return slot, out_active.mask()
    num_in = shape[1] * groups // inner
    in_active = channels(in_, num_in)
    slot.set_active(out_active, in_active)
    per_channel = (shape[0], shape[1] // inner, inner, *shape[2:])
    return slot, slice_mask(per_channel, in_active, out_active, groups).reshape(shape)


def _sets_of(slot: ParameterSlot, *sets: Wanted) -> None:
    shape = slot.parameter.shape
    slot.set_active(channels(sets[0], shape[0]), channels(sets[1], shape[1]))


def _conv_slot() -> ParameterSlot:
    slot = ParameterSlot(nn.Parameter(torch.randn(6, 5, 1, 1)))
    slot.compact = True
    _sets_of(slot, [0, 2], [1, 4])
    return slot


@pytest.mark.parametrize(
    ("shape", "groups", "inner", "out", "in_"), SLICES.values(), ids=SLICES.keys()
)
def test_leaf_holds_the_slice(
    shape: tuple[int, ...], groups: int, inner: int, out: Wanted, in_: Wanted
) -> None:
    slot, mask = _slot(shape, groups, inner, out, in_)
    packed = slot.leaf()
    assert packed.is_leaf and packed.requires_grad
    assert_exact(packed.detach().flatten(), slot.parameter.detach()[mask])
    assert slot.leaf() is packed
    rows = slot.rows()
    assert rows.shape == tuple(packed.shape)
    changed = slot.parameter.detach().clone()
    rows.scatter_(changed, torch.zeros(rows.shape))
    assert_exact(changed, torch.where(mask, 0.0, slot.parameter.detach()))


@pytest.mark.parametrize(
    ("shape", "groups", "inner", "out", "in_"), SLICES.values(), ids=SLICES.keys()
)
def test_gradient_is_the_slice_of_the_dense_one(
    shape: tuple[int, ...], groups: int, inner: int, out: Wanted, in_: Wanted
) -> None:
    slot, mask = _slot(shape, groups, inner, out, in_)
    upstream = torch.randn(shape)
    (slot.leaf().flatten() * upstream[mask]).sum().backward()
    gradient = slot.gradient()
    assert gradient.mask is None
    assert (gradient.out_active, gradient.in_active) == (slot.out_active, slot.in_active)
    assert_exact(gradient.tensor.flatten(), upstream[mask])
    assert slot.parameter.grad is None


@pytest.mark.parametrize("sets", [(None, None), (range(6), range(5))], ids=["None", "listed"])
def test_leaf_of_everything_is_the_parameter(sets: tuple[Wanted, Wanted]) -> None:
    slot = _conv_slot()
    _sets_of(slot, *sets)
    packed = slot.leaf()
    assert packed.data_ptr() == slot.parameter.data_ptr()
    assert slot.rows() is None
    packed.sum().backward()
    assert_exact(slot.gradient().tensor, torch.ones(6, 5, 1, 1))
    assert slot.consumable().slice is None


def test_gradient_accumulates_over_equal_sets() -> None:
    slot = _conv_slot()
    slot.leaf().sum().backward()
    (3 * slot.leaf()).sum().backward()
    assert_exact(slot.gradient().tensor, torch.full((2, 2, 1, 1), 4.0))
    assert slot.consumable() is not None


def test_gradient_promotes_over_different_sets() -> None:
    slot = _conv_slot()
    expected, mask = torch.zeros(6, 5, 1, 1), torch.zeros(6, 5, 1, 1, dtype=torch.bool)
    for factor, sets in ((1.0, ([0, 2], [1, 4])), (10.0, ([2, 3], [0, 4])), (100.0, ([5], [1]))):
        _sets_of(slot, *sets)
        (factor * slot.leaf()).sum().backward()
        for o in sets[0]:
            for i in sets[1]:
                expected[o, i] += factor
                mask[o, i] = True
    gradient = slot.gradient()
    assert_exact(gradient.tensor, expected)
    assert_exact(gradient.mask.expand(6, 5, 1, 1), mask)
    assert (gradient.out_active, gradient.in_active) == (None, None)
    assert slot.consumable() is None


def test_gradient_promotes_with_everything() -> None:
    slot = _conv_slot()
    slot.leaf().sum().backward()
    slot.set_active(None, None)
    slot.leaf().sum().backward()
    gradient = slot.gradient()
    assert gradient.mask is None
    expected = torch.ones(6, 5, 1, 1)
    expected[[[0], [2]], [[1, 4]]] += 1
    assert_exact(gradient.tensor, expected)


def test_different_sets_do_not_share_storage() -> None:
    slot = _conv_slot()
    first = slot.leaf()
    values = first.detach().clone()
    _sets_of(slot, [1, 3], [0, 2])
    second = slot.leaf()
    assert first.data_ptr() != second.data_ptr()
    assert_exact(first.detach(), values)
    _sets_of(slot, [0, 2], [1, 4])
    (first.sum() + second.sum()).backward()
    assert slot.gradient().mask is not None


def test_consume_frees_the_storage() -> None:
    slot = _conv_slot()
    address = slot.leaf().data_ptr()
    slot.leaf().sum().backward()
    slot.consume()
    assert slot.gradient() is None and slot.consumable() is None
    _sets_of(slot, [1], [0, 2, 3])
    again = slot.leaf()
    assert again.data_ptr() == address
    assert_exact(again.detach(), slot.parameter.detach()[[1]][:, [0, 2, 3]])


def test_leaf_goes_stale_with_the_parameter() -> None:
    slot = _conv_slot()
    stale = slot.leaf()
    stale.sum().backward()
    with torch.no_grad():
        slot.parameter.mul_(2)
    assert slot.consumable() is None
    fresh = slot.leaf()
    assert fresh is not stale
    assert_exact(fresh.detach(), slot.parameter.detach()[[0, 2]][:, [1, 4]])
    fresh.sum().backward()
    assert_exact(slot.gradient().tensor, torch.full((2, 2, 1, 1), 2.0))  # of both


def test_leaf_notices_replaced_data() -> None:
    slot = _conv_slot()
    stale = slot.leaf()
    slot.parameter.data = torch.randn(6, 5, 1, 1)
    assert slot.leaf() is not stale
    assert_exact(slot.leaf().detach(), slot.parameter.detach()[[0, 2]][:, [1, 4]])


def test_zero_grad_between_forward_and_backward() -> None:
    slot = _conv_slot()
    slot.leaf().sum().backward()
    slot.zero_grad()
    assert slot.gradient() is None
    loss = slot.leaf().sum()
    slot.zero_grad()
    loss.backward()
    assert_exact(slot.gradient().tensor, torch.ones(2, 2, 1, 1))
    slot.zero_grad()
    assert slot.gradient() is None


def test_zero_grad_forgets_old_leaves() -> None:
    slot = _conv_slot()
    old = slot.leaf()
    slot.zero_grad()
    slot.zero_grad()
    assert slot.leaf() is not old


def test_scale_scales_every_gradient() -> None:
    slot = _conv_slot()
    slot.leaf().sum().backward()
    _sets_of(slot, [5], [0])
    slot.leaf().sum().backward()
    slot.scale_(torch.tensor(0.5))
    assert slot.gradient().tensor[5, 0].item() == 0.5
    assert slot.gradient().tensor[0, 1].item() == 0.5


def test_dense_slot_reports_the_grad_with_its_mask() -> None:
    slot = _conv_slot()
    slot.compact = False
    assert slot.gradient() is None
    slot.parameter.grad = torch.ones(6, 5, 1, 1)
    mask = torch.zeros(6, 5, 1, 1, dtype=torch.bool)
    mask[[[0], [2]], [[1, 4]]] = True
    assert slot.gradient().tensor is slot.parameter.grad
    assert_exact(slot.gradient().mask, mask)
    _sets_of(slot, [5], [0])
    mask[5, 0] = True
    assert_exact(slot.gradient().mask, mask)
    slot.consume()
    assert_exact(slot.gradient().mask.nonzero()[:, :2], torch.tensor([[5, 0]]))
    slot.set_active(None, None)
    assert slot.gradient().mask is None


def test_frozen_parameter_has_a_frozen_leaf() -> None:
    slot = _conv_slot()
    slot.parameter.requires_grad_(False)
    assert not slot.leaf().requires_grad


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copied_slot_starts_dense(how: str) -> None:
    slot = ParameterSlot(nn.Parameter(torch.randn(6, 20)), groups=1, inner=4, packable=False)
    slot.compact = True
    slot.set_active(ChannelSet([1, 2], 6), ChannelSet([0], 5))
    slot.leaf().sum().backward()
    again = copy.deepcopy(slot) if how == "deepcopy" else pickle.loads(pickle.dumps(slot))
    assert not again.compact and again.gradient() is None
    assert (again.groups, again.inner, again.packable) == (1, 4, False)
    assert (again.out_active, again.in_active) == (slot.out_active, slot.in_active)
    assert again.parameter is not slot.parameter
    assert_exact(again.parameter.detach(), slot.parameter.detach())
    assert slot.gradient() is not None


def test_deepcopy_keeps_the_tie_to_its_module() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 5, 1, 1))
            self.kept = {"weight": ParameterSlot(self.weight)}

        def slots(self) -> dict[str, ParameterSlot]:
            return self.kept

    module = copy.deepcopy(nn.ModuleDict({"a": Holder(), "b": nn.Linear(2, 2)}))
    names = dict(parameter_slots(module))
    assert list(names) == ["a.weight"]
    assert names["a.weight"].parameter is module["a"].weight


def test_compact_gradient_trains_as_the_dense_one() -> None:
    slot, _ = _slot((9, 2, 3, 3), 3, 1, [0, 2, 6, 8], [1, 5])
    slot.parameter.data = slot.parameter.data.double()
    full = leaf(slot.parameter.data)
    x = torch.randn(2, 6, 5, 5).double()
    sets = {"in_active": slot.in_active, "out_active": slot.out_active}
    channel_conv2d(x, slot.leaf(), None, groups=3, **sets, packed=True).square().sum().backward()
    masked_conv2d(x, full, None, *sets.values(), groups=3).square().sum().backward()
    got = slot.rows().gather(full.grad)
    assert_gradients_close({"w": slot.gradient().tensor}, {"w": got})


def test_leaves_packed_together_are_those_packed_alone() -> None:
    slots = [_slot((size,), 1, 1, wanted, None)[0] for size, wanted in ((9, 4), (3, 1), (17, 8))]
    weights = [_slot(*case)[0] for case in SLICES.values()]
    whole, frozen = _slot((5,), 1, 1, 5, None)[0], _slot((5,), 1, 1, 2, None)[0]
    frozen.parameter.requires_grad_(False)
    dense = _slot((4,), 1, 1, 2, None)[0]
    dense.compact = False
    pack_leaves([*slots, *weights, whole, frozen, dense])
    assert not dense._leaves
    assert not frozen.leaf().requires_grad
    assert whole.leaf().data_ptr() == whole.parameter.data_ptr()
    for slot in (*slots, *weights):
        (made,) = slot._leaves
        assert slot.leaf() is made.tensor and made.tensor.requires_grad and made.tensor.is_leaf
        assert_exact(made.tensor.detach(), slot.rows().gather(slot.parameter.detach()))
    storages = {slot.leaf().untyped_storage().data_ptr() for slot in (*slots, *weights)}
    assert len(storages) == len(slots) + len(weights)  # torch.compile guards where a view begins
    pack_leaves(slots)  # they have theirs
    assert all(len(slot._leaves) == 1 for slot in slots)
    with torch.no_grad():
        slots[0].parameter.add_(1)
        slots[1].parameter.add_(1)
    pack_leaves(slots)
    assert [len(slot._leaves) for slot in slots] == [2, 2, 1]
    assert_exact(slots[1].leaf().detach(), slots[1].parameter.detach()[slots[1].out_active.mask()])
    slots[2].leaf().sum().backward()
    assert_exact(slots[2].gradient().tensor, torch.ones(8))
