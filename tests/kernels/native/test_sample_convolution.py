"""Native per-sample convolution against the reference in float64."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dcx_kernels.kernels import native, reference
from tolerances import (
    assert_close_to_float64,
    assert_exact,
    assert_gradients_close,
    assert_reruns_equal,
)

_LACKING = native.load("cpu")
pytestmark = pytest.mark.skipif(_LACKING is not None, reason=f"native library: {_LACKING}")
if _LACKING is None:
    from dcx_kernels.kernels.native.cpu import sample_convolution as ours

NCHW, NHWC = torch.contiguous_format, torch.channels_last


class Case(NamedTuple):
    """One convolution; ``c`` or ``k`` None: all channels."""

    samples: int = 3
    C: int = 9
    K: int = 11
    c: int | None = 5
    k: int | None = 8
    image: tuple[int, int] = (7, 6)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    @property
    def window(self) -> tuple[tuple[int, int], ...]:
        return self.stride, self.padding, self.dilation


_STRIDED = {"stride": (2, 2), "image": (15, 15)}
CASES = {
    "both": Case(),
    "out": Case(c=None),
    "in": Case(k=None),
    "neither": Case(c=None, k=None),
    "one": Case(C=1, K=1, c=1, k=1),
    "one-active": Case(c=1, k=1),
    "3": Case(C=3, K=17, c=None, k=3),
    # more than a block of channels; rows of several panels; a last tile of 15 and of 1 columns
    "63-100": Case(C=100, K=63, c=63, k=31, image=(7, 9)),
    "long": Case(C=130, K=7, c=97, k=4, image=(5, 3)),
    "one-sample": Case(samples=1, C=40, K=40, c=20, k=20),
    "wide": Case(samples=2, C=4, K=9, c=3, k=7, image=(5, 70)),
    "several-pixel-blocks": Case(samples=1, C=4, K=200, c=3, k=190, image=(20, 21)),
    "strided": Case(C=40, K=19, c=33, k=13, **_STRIDED),
    "uneven-stride": Case(stride=(2, 3), padding=(0, 2)),
    "dilated": Case(kernel=(3, 2), dilation=(2, 3), padding=(2, 1), image=(9, 8)),
    "stride-and-dilation": Case(stride=(3, 2), dilation=(2, 3), padding=(4, 3), image=(11, 10)),
    "1x1": Case(C=17, K=30, c=9, k=13, kernel=(1, 1), padding=(0, 0)),
    "1x1-strided": Case(kernel=(1, 1), padding=(0, 0), **_STRIDED),
    "5x5": Case(kernel=(5, 5), padding=(2, 2)),
    "pixel": Case(image=(1, 1)),
    "4x4": Case(C=50, K=50, c=25, k=25, image=(4, 4)),
    "rows-divided": Case(samples=1, C=3, K=31, k=None, c=2, image=(4, 5)),
    "border-wider-than-the-image": Case(image=(2, 1), padding=(5, 6)),
    "some-input-never-read": Case(image=(6, 6), stride=(4, 4), padding=(0, 0)),
}


@pytest.fixture(autouse=True, params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


class Problem(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    dy: Tensor
    in_idx: Tensor | None
    out_idx: Tensor | None

    def double(self) -> Problem:
        return Problem(
            *(t.double() if t is not None and t.is_floating_point() else t for t in self)
        )


def _list(count: int | None, channels: int, samples: int) -> Tensor | None:
    """Draw the active channels of every sample, in no order."""
    if count is None:
        return None
    return torch.rand(samples, channels).argsort(1)[:, :count].contiguous()


def _problem(case: Case, dtype: torch.dtype, form: torch.memory_format = NCHW) -> Problem:
    in_idx = _list(case.c, case.C, case.samples)
    out_idx = _list(case.k, case.K, case.samples)
    c, k = case.c if case.c is not None else case.C, case.k if case.k is not None else case.K
    x = torch.randn(case.samples, c, *case.image, dtype=dtype).contiguous(memory_format=form)
    weight, bias = torch.randn(case.K, case.C, *case.kernel, dtype=dtype), torch.randn(case.K)
    pixels = [
        (n + 2 * p - d * (r - 1) - 1) // s + 1
        for n, r, s, p, d in zip(case.image, case.kernel, *case.window, strict=True)
    ]
    dy = torch.randn(case.samples, k, *pixels, dtype=dtype).contiguous(memory_format=form)
    return Problem(x, weight, bias.to(dtype), dy, in_idx, out_idx)


def _results(kernels: ModuleType, case: Case, p: Problem) -> dict[str, Tensor]:
    rest = (p.in_idx, p.out_idx, *case.window)
    return {
        "y": kernels.sample_conv2d_fwd(p.x, p.weight, p.bias, *rest),
        "dx": kernels.sample_conv2d_dgrad(p.dy, p.x, p.weight, *rest),
        "dw": kernels.sample_conv2d_wgrad(p.dy, p.x, p.weight.shape, *rest),
    }


@pytest.fixture
def no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make falling back an error: a comparison of the reference with itself proves nothing."""
    monkeypatch.setattr(ours, "reference", None)


@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize("form", [NCHW, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_reference(case: Case, form: torch.memory_format) -> None:
    problem = _problem(case, torch.float64, form)
    found, wanted = _results(ours, case, problem), _results(reference, case, problem)
    assert_gradients_close(found, wanted)
    for name, result in found.items():
        assert result.stride() == wanted[name].stride(), name


@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize("form", [NCHW, NHWC], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", ["both", "63-100", "strided", "several-pixel-blocks", "1x1"])
def test_float32(name: str, form: torch.memory_format) -> None:
    case = CASES[name]
    problem = _problem(case, torch.float32, form)
    found, torchs = _results(ours, case, problem), _results(reference, case, problem)
    truth = _results(reference, case, problem.double())
    for result, value in found.items():
        assert_close_to_float64(value, torchs[result], truth[result], result)


@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize("name", ["both", "strided"])
def test_strides_of_every_argument(name: str) -> None:
    case = CASES[name]
    p = _problem(case, torch.float64)
    assert p.bias is not None and p.in_idx is not None and p.out_idx is not None
    wanted = _results(reference, case, p)
    odd = Problem(
        p.x.repeat_interleave(2, 3)[..., ::2],
        p.weight.to(memory_format=NHWC),
        p.bias.repeat_interleave(2)[::2],
        p.dy.transpose(0, 1).contiguous().transpose(0, 1),
        p.in_idx.T.contiguous().T,
        p.out_idx.repeat_interleave(2, 1)[:, ::2],
    )
    assert_gradients_close(_results(ours, case, odd), wanted)
    sliced = odd._replace(dy=p.dy.repeat(1, 1, 2, 2)[..., : p.dy.shape[2], : p.dy.shape[3]])
    assert_gradients_close(_results(ours, case, sliced), wanted)


@pytest.mark.usefixtures("no_reference")
def test_no_bias() -> None:
    case = CASES["both"]
    problem = _problem(case, torch.float64)._replace(bias=None)
    assert_gradients_close(_results(ours, case, problem), _results(reference, case, problem))


@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize(
    "case",
    [Case(samples=0), Case(c=0), Case(k=0), Case(c=0, k=0), Case(C=0, c=None)],
    ids=["no-sample", "no-input", "no-output", "nothing", "no-channel"],
)
def test_nothing_to_convolve(case: Case) -> None:
    p = _problem(case, torch.float32)
    assert p.bias is not None and p.out_idx is not None
    found = _results(ours, case, p)
    assert_exact(found["y"], p.bias[p.out_idx][:, :, None, None].expand_as(p.dy).contiguous())
    assert_exact(found["dx"], torch.zeros_like(p.x))
    assert_exact(found["dw"], torch.zeros_like(p.weight))


@pytest.mark.usefixtures("no_reference")
def test_losers_are_never_read_and_get_no_gradient() -> None:
    case = Case(samples=2, C=4, K=4, c=2, k=2)
    p = _problem(case, torch.float32)
    there = torch.zeros(4, 4, dtype=torch.bool)
    there[[0, 3]] = True
    found = _results(
        ours,
        case,
        p._replace(
            weight=p.weight.masked_fill(~there[:, :, None, None], torch.nan),
            bias=torch.tensor([1.0, torch.nan, torch.nan, 2.0]),
            in_idx=torch.tensor([[0, 1], [2, 3]]),
            out_idx=torch.tensor([[0, 3], [3, 0]]),
        ),
    )
    assert all(value.isfinite().all() for value in found.values())
    assert_exact(found["dw"] != 0, there[:, :, None, None].expand_as(p.weight).contiguous())


@pytest.mark.parametrize("name", ["both", "63-100", "one-sample", "strided"])
def test_any_number_of_threads_gives_the_same_bits(name: str) -> None:
    case = CASES[name]
    problem = _problem(case._replace(samples=5), torch.float32)

    def run() -> list[Tensor]:
        return list(_results(ours, case, problem).values())

    assert_reruns_equal(run)
    here = run()
    torch.set_num_threads(3)
    for one, other in zip(run(), here, strict=True):
        assert_exact(one, other)


def test_many_samples_are_summed_in_chunks() -> None:
    """More copies of x than the weight's gradient keeps at once (8 MiB)."""
    case = Case(samples=40, C=20, K=4, c=17, k=2, image=(32, 32))
    problem = _problem(case, torch.float64)
    found, wanted = _results(ours, case, problem), _results(reference, case, problem)
    assert_gradients_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_is_the_reference_s(dtype: torch.dtype) -> None:
    case = CASES["both"]
    problem = _problem(case, dtype)
    found, wanted = _results(ours, case, problem), _results(reference, case, problem)
    for name, value in found.items():
        assert_exact(value, wanted[name], name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_idx": torch.full((3, 5), 9)}, "expected channels below 9 in in_idx, got 9"),
        ({"out_idx": torch.full((3, 8), -1)}, "expected channels below 11 in out_idx, got -1"),
        ({"in_idx": torch.zeros(3, 4, dtype=torch.int64)}, "expected in_idx of 3 times 5 channels"),
        ({"in_idx": torch.zeros(3, 5, dtype=torch.int32)}, "expected in_idx contiguous, int64"),
        ({"out_idx": torch.zeros(2, 8, dtype=torch.int64)}, "expected out_idx of 3 times 8"),
        ({"in_idx": None}, "expected all 9 channels without in_idx, got 5"),
        ({"dy": torch.zeros(3, 8, 7, 5)}, "expected 6 pixels, got 5"),
        ({"dy": torch.zeros(2, 8, 7, 6)}, "expected 3 samples, got 2"),
        ({"x": torch.zeros(3, 5, 7)}, "expected 4-D tensors on the CPU, got 3"),
        ({"x": torch.zeros(3, 5, 7, 6).double()}, "expected one dtype"),
    ],
)
@pytest.mark.parametrize("name", ["fwd", "dgrad", "wgrad"])
def test_refuses_what_does_not_fit(name: str, change: dict[str, Tensor], message: str) -> None:
    """The operators themselves, which trust nobody; nothing is written."""
    p = _problem(Case(), torch.float32)._replace(**change)
    written = {
        "fwd": (p.dy, p.x, p.weight, None),
        "dgrad": (p.x, p.dy, p.weight),
        "wgrad": (p.weight, p.dy, p.x),
    }[name]
    before = written[0].clone()
    operator = getattr(torch.ops.dcx_native, f"sample_conv2d_{name}")
    with pytest.raises(RuntimeError, match=f"sample_conv2d_{name}: {message}"):
        operator(*written, p.in_idx, p.out_idx, [1, 1], [1, 1], [1, 1])
    assert_exact(written[0], before)


@pytest.mark.parametrize("bad", [torch.zeros(10), torch.zeros(11).double(), torch.zeros(1, 11)])
def test_refuses_another_bias(bad: Tensor) -> None:
    p = _problem(Case(), torch.float32)
    with pytest.raises(RuntimeError, match="expected bias of 11 values, of x's dtype"):
        torch.ops.dcx_native.sample_conv2d_fwd(
            p.dy, p.x, p.weight, bad, p.in_idx, p.out_idx, [1, 1], [1, 1], [1, 1]
        )


@pytest.mark.parametrize("name", ["fwd", "dgrad", "wgrad"])
@pytest.mark.parametrize(
    "window",
    [([0, 1], [1, 1], [1, 1]), ([1, 1], [1, -1], [1, 1]), ([1, 1], [1, 1], [0, 1])],
    ids=["stride", "padding", "dilation"],
)
def test_refuses_a_window_that_is_none(name: str, window: tuple[list[int], ...]) -> None:
    p = _problem(Case(), torch.float32)
    operands = {
        "fwd": (p.dy, p.x, p.weight, None),
        "dgrad": (p.x, p.dy, p.weight),
        "wgrad": (p.weight, p.dy, p.x),
    }[name]
    operator = getattr(torch.ops.dcx_native, f"sample_conv2d_{name}")
    with pytest.raises(RuntimeError, match="expected positive strides, dilations and filter sizes"):
        operator(*operands, p.in_idx, p.out_idx, *window)


def test_refuses_a_weight_gradient_that_is_not_contiguous() -> None:
    p = _problem(Case(), torch.float32)
    dw = torch.zeros_like(p.weight).contiguous(memory_format=NHWC)
    with pytest.raises(RuntimeError, match="sample_conv2d_wgrad: expected dw contiguous"):
        torch.ops.dcx_native.sample_conv2d_wgrad(
            dw, p.dy, p.x, p.in_idx, p.out_idx, [1, 1], [1, 1], [1, 1]
        )
    assert dw.eq(0).all()


@pytest.mark.parametrize(
    ("operator", "name"),
    [
        *(("fwd", name) for name in ("x", "weight", "bias")),
        *(("dgrad", name) for name in ("dy", "x", "weight")),
        *(("wgrad", name) for name in ("dy", "x")),
    ],
)
def test_mixed_dtypes_are_the_reference_s(operator: str, name: str) -> None:
    """Its result, or its error."""
    case = CASES["both"]
    p = _problem(case, torch.float32)
    p = p._replace(**{name: getattr(p, name).bfloat16()})
    operands = {
        "fwd": (p.x, p.weight, p.bias),
        "dgrad": (p.dy, p.x, p.weight),
        "wgrad": (p.dy, p.x, p.weight.shape),
    }[operator]

    def outcome(kernels: ModuleType) -> Tensor | str:
        run = getattr(kernels, f"sample_conv2d_{operator}")
        try:
            result: Tensor = run(*operands, p.in_idx, p.out_idx, *case.window)
        except RuntimeError as error:
            return str(error)
        return result

    found, wanted = outcome(ours), outcome(reference)
    if isinstance(wanted, str) or isinstance(found, str):
        assert found == wanted
    else:
        assert_exact(found, wanted)
