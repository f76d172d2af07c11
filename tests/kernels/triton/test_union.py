"""Sums over unions of channels, gather and scatter are exact, in every form of memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dcx_kernels.kernels import reference
from dcx_kernels.kernels.triton.union import gather, scatter, union_add
from tolerances import assert_exact, assert_reruns_equal

SIZES = {"odd": (3, 3), "one-pixel": (1, 1), "vectors": (2, 4), "long": (19, 23), "empty": (0, 2)}
TERMS = {  # places of a, of b, channels of the sum
    "disjoint": ([0, 2], [1], 3),
    "full-a": ([0, 1, 2, 3, 4, 5, 6], [1, 5], 7),
    "full-b": ([3], [0, 1, 2, 3, 4], 5),
    "both": ([0, 1, 2], [0, 1, 2], 3),
    "overlap": (list(range(0, 17, 2)), list(range(0, 17, 3)), 17),
    "one": ([0], [0], 1),
    "nothing": ([], [0, 1], 2),
    "many": (list(range(1, 63)), [0, 5, 61, 63], 64),
}
FORMS = ["contiguous", "channels_last", "slice"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def _make(shape: tuple[int, ...], dtype: torch.dtype, form: str, device: torch.device) -> Tensor:
    """Return random numbers in a layout, between NaN that must not be read."""
    last = form != "contiguous" and len(shape) == 4
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(shape[0], shape[1] + 3, *shape[2:]).to(device, dtype)
    x = x.contiguous(memory_format=layout)
    if form == "slice":
        x[:, shape[1] :] = float("nan")
        return x[:, : shape[1]]
    return x[:, : shape[1]].contiguous(memory_format=layout)


def _union(
    terms: tuple[list[int], list[int], int],
    size: tuple[int, ...],
    forms: tuple[str, str],
    dtypes: tuple[torch.dtype, torch.dtype],
    device: torch.device,
    batch: int = 2,
) -> None:
    a_list, b_list, num_out = terms
    a = _make((batch, len(a_list), *size), dtypes[0], forms[0], device)
    b = _make((batch, len(b_list), *size), dtypes[1], forms[1], device)
    a_idx = torch.tensor(a_list, dtype=torch.int64, device=device)
    b_idx = torch.tensor(b_list, dtype=torch.int64, device=device)
    y = union_add(a, b, a_idx, b_idx, num_out)
    dtype = torch.promote_types(*dtypes)
    expected = torch.zeros((batch, num_out, *size), dtype=dtype, device=device)
    expected[:, a_idx] += a.to(dtype)
    expected[:, b_idx] += b.to(dtype)
    assert_exact(y, expected)
    if a_list:
        other = reference.union_add(a, b, a_idx, b_idx, num_out)
        assert_exact(y, other, "the reference's")
    last = len(size) == 2 and size != (1, 1) and {"channels_last", "slice"} & {*forms}
    form = torch.channels_last if last and y.numel() else None
    assert y.is_contiguous(memory_format=form or torch.contiguous_format)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("terms", [TERMS["disjoint"], TERMS["full-a"]], ids=["disjoint", "full"])
def test_union_of_sizes(
    terms: tuple[list[int], list[int], int],
    size: tuple[int, int],
    form: str,
    device: torch.device,
) -> None:
    _union(terms, size, (form, form), (torch.float32, torch.float32), device)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
def test_union_of_terms(
    terms: tuple[list[int], list[int], int], form: str, device: torch.device
) -> None:
    _union(terms, (4, 2), (form, form), (torch.bfloat16, torch.bfloat16), device)


@pytest.mark.parametrize("second", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("first", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_union_of_dtypes_and_forms(
    first: torch.dtype, second: torch.dtype, device: torch.device
) -> None:
    _union(TERMS["overlap"], (3, 2), ("contiguous", "channels_last"), (first, second), device)


@pytest.mark.parametrize("size", [(), (5,), (2, 2, 3)], ids=["matrix", "line", "cube"])
@pytest.mark.parametrize("batch", [0, 1, 40], ids=lambda batch: f"batch{batch}")
def test_union_of_dims(size: tuple[int, ...], batch: int, device: torch.device) -> None:
    forms, dtypes = ("contiguous", "slice"), (torch.float32, torch.float32)
    _union(TERMS["overlap"], size, forms, dtypes, device, batch)
    _union(TERMS["one"], size, forms, dtypes, device, batch)


def test_union_of_float64_is_the_reference(device: torch.device) -> None:
    _union(TERMS["overlap"], (2, 2), ("slice", "slice"), (torch.float64, torch.float32), device)


ANY = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8]


@pytest.mark.parametrize("wanted", [[0], [1, 2, 16], list(range(17))], ids=["one", "some", "all"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [*SIZES.values(), (), (5,)], ids=[*SIZES.keys(), "matrix", "line"])
def test_gather_and_scatter(
    size: tuple[int, ...], form: str, wanted: list[int], device: torch.device
) -> None:
    x = _make((2, 17, *size), torch.float32, form, device)
    active = torch.tensor(wanted, device=device)
    y = gather(x, active)
    assert_exact(y, x[:, active])
    form_of = torch.channels_last if form != "contiguous" and len(size) == 2 else None
    if size in ((3, 3), (2, 4)):
        expected = torch.empty(y.shape, memory_format=form_of or torch.contiguous_format)
        assert y.stride() == expected.stride()
    z = scatter(y, active, 17)
    assert_exact(z, torch.zeros_like(x).index_copy_(1, active, x[:, active]))
    if size in ((3, 3), (2, 4)):
        assert z.is_contiguous(memory_format=form_of or torch.contiguous_format)


@pytest.mark.parametrize("dtype", [*ANY, torch.complex128], ids=str)
def test_gather_and_scatter_any_bits(dtype: torch.dtype, device: torch.device) -> None:
    x = (torch.randn(3, 9, 2, 3).to(device) * 9).to(dtype)
    active = torch.tensor([0, 3, 4, 8], device=device)
    for given in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3)):
        y = gather(given, active)
        assert y.dtype == dtype and torch.equal(y, given[:, active])
        z = scatter(y, active, 9)
        assert z.dtype == dtype and torch.equal(z[:, active], y)
        assert torch.count_nonzero(z) == torch.count_nonzero(y)


def test_order_of_lists_is_free(device: torch.device) -> None:
    x = torch.randn(2, 5, 3, 3).to(device)
    active = torch.tensor([4, 0, 2], device=device)
    y = gather(x, active)
    assert_exact(y, x[:, active])
    assert_exact(scatter(y, active, 5)[:, active], y)


def test_more_channels_than_lanes(device: torch.device) -> None:
    """The lists are inverted 1024 entries at a time."""
    active = torch.randperm(2100)[:1500].sort().values.to(device)
    x = torch.randn(1, 1500).to(device)
    assert_exact(scatter(x, active, 2100), x.new_zeros(1, 2100).index_copy_(1, active, x))


def test_rerun_bit_equal_and_nothing_left_unwritten(device: torch.device) -> None:
    x = _make((2, 17, 3, 3), torch.bfloat16, "channels_last", device)
    active = torch.tensor([1, 5, 16], device=device)
    whole = torch.arange(17, device=device)

    def run() -> list[Tensor]:
        y = gather(x, active)
        return [y, scatter(y, active, 17), union_add(y, x, active, whole, 17)]

    assert_reruns_equal(run, 2)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # memory is filled with NaN
    try:
        for result in run():
            assert result.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(deterministic)
