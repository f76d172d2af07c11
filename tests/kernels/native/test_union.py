"""Native sums over unions of channels are exact, in every form of memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcx_kernels.kernels import reference
from dcx_kernels.kernels.native import load
from tolerances import assert_exact, assert_reruns_equal

if (lacking := load("cpu")) is not None:
    pytest.skip(f"the native library of CPUs is {lacking}", allow_module_level=True)

from dcx_kernels.kernels.native.cpu.union import union_add

SIZES = {"odd": (3, 3), "one-pixel": (1, 1), "line": (5,), "matrix": (), "long": (19, 23)}
TERMS = {  # places of a, of b, channels of the sum
    "disjoint": ([0, 2], [1], 3),
    "full-a": ([0, 1, 2, 3, 4, 5, 6], [1, 5], 7),
    "full-b": ([3], [0, 1, 2, 3, 4], 5),
    "both": ([0, 1, 2], [0, 1, 2], 3),
    "overlap": (list(range(0, 17, 2)), list(range(0, 17, 3)), 17),
    "one": ([0], [0], 1),
    "no-a": ([], [0, 1], 2),
    "no-b": ([0, 1, 2], [], 3),
    "many": (list(range(1, 63)), [0, 5, 61, 63], 64),
}
FORMS = ["contiguous", "channels_last", "padded", "padded_last"]
DTYPES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
Terms = tuple[list[int], list[int], int]


def _make(shape: tuple[int, ...], dtype: torch.dtype, form: str) -> Tensor:
    """Return random numbers in a form of memory, between NaN that must not be read."""
    last = form.endswith("last") and len(shape) == 4
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(shape).to(dtype)
    if not form.startswith("padded"):
        return x.contiguous(memory_format=layout)
    wide = x.new_full((shape[0], shape[1] + 3, *shape[2:]), float("nan"))
    wide = wide.contiguous(memory_format=layout)
    wide[:, : shape[1]] = x
    return wide[:, : shape[1]]


def _check(
    terms: Terms,
    size: tuple[int, ...] = (4, 2),
    forms: tuple[str, str] = ("contiguous", "contiguous"),
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    batch: int = 2,
) -> None:
    places_a, places_b, num_out = terms
    a = _make((batch, len(places_a), *size), dtypes[0], forms[0])
    b = _make((batch, len(places_b), *size), dtypes[1], forms[1])
    a_idx, b_idx = (torch.tensor(p, dtype=torch.int64) for p in (places_a, places_b))
    y = union_add(a, b, a_idx, b_idx, num_out)
    dtype = torch.promote_types(*dtypes)
    expected = torch.zeros((batch, num_out, *size), dtype=dtype)
    expected[:, a_idx] += a.to(dtype)
    expected[:, b_idx] += b.to(dtype)
    assert_exact(y, expected)
    last = len(size) == 2 and size != (1, 1) and any(form.endswith("last") for form in forms)
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    if places_a and places_b:
        assert_exact(reference.union_add(a, b, a_idx, b_idx, num_out), y)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
def test_terms_and_sizes(terms: Terms, size: tuple[int, ...], form: str) -> None:
    _check(terms, size, (form, form))


@pytest.mark.parametrize("second", FORMS)
@pytest.mark.parametrize("first", FORMS)
def test_mixed_layouts(first: str, second: str) -> None:
    _check(TERMS["overlap"], (3, 4), (first, second))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("second", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("first", DTYPES.values(), ids=DTYPES.keys())
def test_dtypes(first: torch.dtype, second: torch.dtype, form: str) -> None:
    for name in ("overlap", "both", "no-a"):
        _check(TERMS[name], (3, 2), (form, form), (first, second))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [0, 1, 40])
def test_batches(batch: int, form: str) -> None:
    for name in ("overlap", "one"):
        _check(TERMS[name], (3, 2), (form, form), batch=batch)


@pytest.mark.parametrize("form", FORMS)
def test_threads_and_reruns(form: str) -> None:
    a = _make((8, 48, 13, 11), torch.float32, form)
    b = _make((8, 40, 13, 11), torch.float32, form)
    order = torch.randperm(64)
    a_idx, b_idx = order[:48].sort().values, order[24:].sort().values

    def run() -> list[Tensor]:
        return [union_add(a, b, a_idx, b_idx, 64)]

    assert_reruns_equal(run)
    assert_exact(run()[0], reference.union_add(a, b, a_idx, b_idx, 64))
    threads, several = torch.get_num_threads(), run()
    torch.set_num_threads(1)
    try:
        assert_exact(run()[0], several[0])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "place, message", [(3, "below num_out, got 3"), (-1, "below num_out, got -1")]
)
def test_places_are_checked(place: int, message: str) -> None:
    a, b = torch.randn(2, 2, 3, 3), torch.randn(2, 1, 3, 3)
    with pytest.raises(RuntimeError, match=message):
        union_add(a, b, torch.tensor([0, 1]), torch.tensor([place]), 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": torch.zeros(3, 1, 3, 3)}, "terms of one dtype that differ in channels only"),
        ({"b": torch.zeros(2, 1, 3, 4)}, "terms of one dtype that differ in channels only"),
        ({"b": torch.zeros(2, 1, 9)}, "terms of one dtype that differ in channels only"),
        ({"b": torch.zeros(2, 1, 3, 3).double()}, "terms of one dtype"),
        ({"a": torch.zeros(2, 2, 3, 3).half()}, "x of float32, float64 or bfloat16"),
        ({"a_idx": torch.tensor([0])}, "an int64 index for every channel"),
        ({"b_idx": torch.tensor([0, 1])}, "an int64 index for every channel"),
        ({"b_idx": torch.tensor([0]).int()}, "an int64 index for every channel"),
        ({"a_idx": torch.tensor([0, 0, 1])[::2]}, "an int64 index for every channel"),
    ],
)
def test_operator_refuses(change: dict[str, Tensor], message: str) -> None:
    given = {
        "a": torch.zeros(2, 2, 3, 3),
        "b": torch.zeros(2, 1, 3, 3),
        "a_idx": torch.tensor([0, 1]),
        "b_idx": torch.tensor([2]),
    }
    with pytest.raises(RuntimeError, match=f"union_add: .*{message}"):
        torch.ops.dcx_native.union_add(*(given | change).values(), 3)


@pytest.mark.parametrize("form", FORMS)
def test_a_single_term_is_copied(form: str) -> None:
    """What adds in place behind the sum must not change the term."""
    term = _make((2, 3, 4, 5), torch.float32, form)
    none, places = torch.zeros(2, 0, 4, 5), (torch.arange(3), torch.arange(0))
    for y in (union_add(term, none, *places, 3), union_add(none, term, *places[::-1], 3)):
        assert_exact(y, term)
        assert y.data_ptr() != term.data_ptr()
