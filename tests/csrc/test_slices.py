"""Slices on the emulated GPU, through the functions of the backend, against masks and torch."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dcx_kernels.kernels.native.cuda import optimizer, slices
from dcx_kernels.kernels.reference import slices as reference
from dcx_kernels.kernels.slices import Slice
from slice_cases import CASES, make, masks, nothing
from tolerances import assert_close_to_float64, assert_exact

_FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BETAS = (0.9, 0.99)


@pytest.fixture
def launches(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run the operators of the library emulated; return which were called."""
    called: list[str] = []

    def address(table: Tensor) -> tuple[int, int, int]:
        return table.data_ptr(), len(table), table.shape[1]

    def move(table: Tensor, blocks: int, size: int, scatter: bool) -> None:
        called.append("move")
        emulated.move_slices(*address(table), blocks, size, scatter, 0)

    def sgd(table: Tensor, blocks: int, dtype: torch.dtype, with_momentum: bool, lr: float,
            momentum: float, undamped: float, decay: float, nesterov: bool,
            maximize: bool) -> None:  # fmt: skip
        called.append("sgd")
        sign = -1.0 if maximize else 1.0
        emulated.sgd_slices(*address(table), blocks, _FLOATS[dtype], lr, momentum, undamped, decay,
                            sign, with_momentum, nesterov)  # fmt: skip

    def adamw(table: Tensor, blocks: int, dtype: torch.dtype, amsgrad: bool, decay: float,
              beta1: float, beta2: float, eps: float, maximize: bool) -> None:  # fmt: skip
        called.append("adamw")
        sign = -1.0 if maximize else 1.0
        emulated.adamw_slices(*address(table), blocks, _FLOATS[dtype], decay, beta1, 1.0 - beta1,
                              beta2, 1.0 - beta2, eps, sign, amsgrad)  # fmt: skip

    ops = SimpleNamespace(move_slice_blocks=move, sgd_slice_blocks=sgd, adamw_slice_blocks=adamw)
    monkeypatch.setattr(torch.ops, "dcx_native", ops, raising=False)
    here = replace(slices.READER, serves=lambda tensor: tensor.is_cpu)
    moves, steps = replace(slices.MOVES, reader=here), replace(optimizer.STEPS, reader=here)
    for name in ("gather_slices", "scatter_slices_"):
        monkeypatch.setattr(slices, name, getattr(moves, name))
    for name in ("sgd_slices_", "adamw_slices_"):
        monkeypatch.setattr(optimizer, name, getattr(steps, name))
    return called


def _numbers(dtype: torch.dtype) -> list[Tensor]:
    """Return full tensors whose entries all differ, as far as the dtype has numbers for it."""
    made, start = [], 1
    for case in CASES.values():
        count = torch.Size(case.shape).numel()
        bits = torch.arange(start, start + count).to(_BITS[dtype.itemsize])
        made.append(bits.view(dtype).view(case.shape))
        start += count
    return made


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.int64], ids=str
)
def test_gather_is_indexing(launches: list[str], dtype: torch.dtype) -> None:
    made = make()
    dense = _numbers(dtype)
    # one begins at an odd address, and has memory behind it that is not its own
    out = [None if t.dim() == 1 else torch.zeros(9999, dtype=dtype)[1:] for t in dense]
    for memory in (None, out):
        packed = slices.gather_slices(dense, made, memory)
        for name, part, full, mask in zip(CASES, packed, dense, masks(made), strict=True):
            assert_exact(part.flatten(), full[mask], name)
    for part, memory in zip(packed, out, strict=True):
        assert memory is None or not memory[part.numel() :].any()
    assert launches == ["move", "move"]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_scatter_leaves_the_rest_bitwise(launches: list[str], dtype: torch.dtype) -> None:
    made = make()
    dense = _numbers(dtype)
    before = [tensor.clone() for tensor in dense]
    versions = [tensor._version for tensor in dense]
    packed = [part.flip(0) for part in reference.gather_slices(dense, made)]
    slices.scatter_slices_(dense, packed, made)
    for name, full, old, part, mask in zip(CASES, dense, before, packed, masks(made), strict=True):
        assert_exact(full[mask], part.flatten(), name)
        assert_exact(full[~mask], old[~mask], name)
    assert all(t._version > version for t, version in zip(dense, versions, strict=True))
    assert launches == ["move"]


def test_long_rows_move_in_vectors_and_in_part(launches: list[str]) -> None:
    """Channels that follow each other, and lists of 100, 63 and 1, at odd places."""
    shapes = [(8, 64, 1, 1), (100, 100), (63, 17, 3, 3), (130, 8, 3, 3), (4099,)]
    lists: list[tuple[Tensor | None, Tensor | None]] = [
        (torch.tensor([1, 2, 6]), torch.arange(8, 40)),
        (torch.arange(3, 100), torch.arange(100)),
        (torch.arange(0, 63, 5), torch.tensor([16])),
        (None, torch.tensor([0, 1, 2, 5])),
        (torch.arange(1, 4099, 3), None),
    ]
    made: list[Slice | None] = [
        Slice(shape, out, in_) for shape, (out, in_) in zip(shapes, lists, strict=True)
    ]
    for dtype in (torch.float32, torch.float16):
        dense = [torch.randn(shape).to(dtype) for shape in shapes]
        wanted = reference.gather_slices(dense, made)
        packed = slices.gather_slices(dense, made)
        for part, expected in zip(packed, wanted, strict=True):
            assert_exact(part, expected)
    assert launches == ["move"] * 2


def test_hundreds_of_slices_are_found(launches: list[str]) -> None:
    """The search for a block's slice takes more than one round above 32 lines."""
    for count in (1, 31, 32, 33, 100, 1100):
        dense = [torch.full((1 + i % 7,), float(i)) for i in range(count)]
        dense[count // 2] = torch.full((3000,), -1.0)
        packed = slices.gather_slices(dense, [None] * count)
        for part, full in zip(packed, dense, strict=True):
            assert_exact(part, full)
    assert len(launches) == 6


def test_slices_without_an_entry_launch_nothing(launches: list[str]) -> None:
    made = nothing()
    dense = [torch.randn(slice_.shape) for slice_ in made]
    assert [part.numel() for part in slices.gather_slices(dense, made)] == [0, 0, 0]
    slices.scatter_slices_(dense, [torch.empty(s.packed_shape) for s in made], made)
    assert launches == []


def test_what_the_kernels_do_not_know_goes_to_the_reference(launches: list[str]) -> None:
    slice_ = Slice((6, 4), torch.tensor([1, 4]), torch.tensor([0, 3]))
    full = torch.randn(4, 6).t()
    (part,) = slices.gather_slices([full], [slice_])
    assert_exact(part, full[[1, 4]][:, [0, 3]])
    assert launches == []


@pytest.mark.parametrize("cast", [(1, torch.float16), (2, torch.bfloat16)], ids=str)
def test_gather_casts(emulated: ModuleType, cast: tuple[int, torch.dtype]) -> None:
    number, dtype = cast
    made, dense = make(), [torch.randn(case.shape) for case in CASES.values()]
    table = slices.READER.table(own=2)
    packed = []
    for full, slice_ in zip(dense, made, strict=True):
        shape = full.shape if slice_ is None else slice_.packed_shape
        packed.append(torch.empty(shape, dtype=dtype))
        table.add(slice_, full, full.data_ptr(), packed[-1].data_ptr())
    lines = torch.tensor(table.numbers)
    emulated.move_slices(
        lines.data_ptr(), len(table), table.columns, table.blocks, 4, False, number
    )
    for part, expected in zip(packed, reference.gather_slices(dense, made), strict=True):
        assert_exact(part, expected.to(dtype))


@pytest.mark.parametrize("dtype", list(_FLOATS), ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.0, "weight_decay": 0.0},
        {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.01, "maximize": True},
    ],
    ids=str,
)
def test_sgd_is_torchs_at_the_slice(
    launches: list[str], dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    full = {"lr": 0.1, "dampening": 0.0, "nesterov": False, "maximize": False} | settings
    states = 1 if settings["momentum"] else 0

    def run(module: ModuleType, used: torch.dtype) -> list[list[Tensor]]:
        made, params, grads, state = _problem(used, dtype, states)
        buffers = state[0] if states else None
        for fresh in (True, False):
            module.sgd_slices_(params, grads, buffers, made, [fresh] * len(made), **full)
        return [params, *state]

    _compare(run, dtype)
    assert launches == ["sgd"] * 2


@pytest.mark.parametrize("dtype", list(_FLOATS), ids=str)
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("maximize", [False, True], ids=["down", "up"])
def test_adamw_is_torchs_at_the_slice(
    launches: list[str], dtype: torch.dtype, amsgrad: bool, maximize: bool
) -> None:
    def run(module: ModuleType, used: torch.dtype) -> list[list[Tensor]]:
        made, params, grads, state = _problem(used, dtype, 3 if amsgrad else 2)
        steps = [torch.tensor(float(i % 3)) for i in range(len(made))]
        moments = state if amsgrad else [*state, None]
        for _ in range(2):
            module.adamw_slices_(
                params, grads, *moments, steps, made, lr=0.1, betas=_BETAS, eps=1e-4,
                weight_decay=0.1, maximize=maximize,
            )  # fmt: skip
        assert [step.item() for step in steps] == [2.0 + i % 3 for i in range(len(made))]
        return [params, *state]

    _compare(run, dtype)
    assert launches == ["adamw"] * 2


def test_a_step_without_decay_does_not_spread_infinities(launches: list[str]) -> None:
    """0 * inf is NaN: torch leaves the term out."""
    param, grad = torch.full((5,), torch.inf), torch.ones(5)
    common: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.0, "maximize": False}
    optimizer.sgd_slices_([param], [grad], None, [None], [False], momentum=0.0, dampening=0.0,
                          nesterov=False, **common)  # fmt: skip
    assert param.tolist() == [torch.inf] * 5
    zeros = [torch.zeros(5) for _ in range(2)]
    optimizer.adamw_slices_([param], [grad], zeros[:1], zeros[1:], None, [torch.tensor(0.0)],
                            [None], betas=_BETAS, eps=1e-8, **common)  # fmt: skip
    assert param.tolist() == [torch.inf] * 5
    assert launches == ["sgd", "adamw"]


def _problem(
    used: torch.dtype, rounded_to: torch.dtype, states: int
) -> tuple[list[Slice | None], list[Tensor], list[Tensor], list[list[Tensor]]]:
    """Return slices, parameters, packed gradients and state, the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(5)

    def numbers(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).to(rounded_to).to(used)

    torch.manual_seed(5)  # sets are drawn at random
    made = make()
    params = [numbers(case.shape) for case in CASES.values()]
    full = [numbers(case.shape) for case in CASES.values()]
    grads = reference.gather_slices(full, made)
    state = [[numbers(case.shape).abs() for case in CASES.values()] for _ in range(states)]
    return made, params, grads, state


def _compare(run: Any, dtype: torch.dtype) -> None:
    made, params, _, state = _problem(dtype, dtype, 3)
    old = [params, *state]  # as much state as any has
    ours, torchs, truth = run(optimizer, dtype), run(reference, dtype), run(reference, torch.double)
    assert len(ours) == len(torchs) == len(truth)
    for own, same, exact, kept in zip(ours, torchs, truth, old, strict=False):
        flat: list[list[Tensor]] = [[], [], []]
        changed = 0
        for name, a, b, c, mask, unchanged in zip(
            CASES, own, same, exact, masks(made), kept, strict=True
        ):
            assert_exact(a[~mask], unchanged[~mask], name)
            changed += int((a != unchanged).sum())
            for values, one in zip(flat, (a, b, c), strict=True):
                values.append(one[mask])
        # some changes are rounded away in 16 bits, and a maximum does not always change
        assert changed > 0.2 * sum(part.numel() for part in flat[0])
        assert_close_to_float64(*(torch.cat(values) for values in flat))
