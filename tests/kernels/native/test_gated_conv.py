"""A layer with a gate in one native call against the reference's composition in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dcx_kernels.kernels import native, reference
from dcx_kernels.kernels.reference.gate import k_winners
from dcx_kernels.nn.gated_conv import GatedConv2d
from dcx_kernels.nn.gated_conv_channels import SampleChannels
from gated_oracle import odd_case
from tolerances import (
    assert_close_to_float64,
    assert_exact,
    assert_gradients_close,
    assert_reruns_equal,
)

_LACKING = native.load("cpu")
pytestmark = pytest.mark.skipif(_LACKING is not None, reason=f"native library: {_LACKING}")
if _LACKING is None:
    from dcx_kernels.kernels.native.cpu import gated_convolution as ours


class Case(NamedTuple):
    """One layer; ``c`` None: x is dense; ``k`` = K: all win."""

    samples: int = 3
    C: int = 9
    K: int = 11
    c: int | None = 5
    k: int = 8
    image: tuple[int, int] = (7, 6)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    relu: bool = True


CASES = {
    "both": Case(),
    "stem": Case(samples=1, C=3, K=17, c=None, k=9, image=(11, 13), padding=(0, 0)),
    "all-win": Case(k=11),
    "dense": Case(c=None, k=11),
    "no-relu": Case(relu=False),
    "one": Case(samples=1, C=1, K=1, c=1, k=1, image=(1, 1)),
    "one-active": Case(c=1, k=1),
    "63-100": Case(samples=2, C=100, K=63, c=63, k=31, image=(7, 9)),
    "strided": Case(samples=2, stride=(2, 2), image=(15, 15)),
    "odd-window": Case(kernel=(3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    "one-sample": Case(samples=1, C=40, K=40, c=20, k=20, image=(12, 12)),
    "rows-divided": Case(samples=1, C=50, K=50, c=25, k=30, image=(4, 4)),
    "many-samples": Case(samples=17, C=17, K=16, c=3, k=7),
    "no-sample": Case(samples=0),
}


class Problem(NamedTuple):
    """Arguments in the order of the function, up to eps."""

    x: Tensor
    in_idx: Tensor | None
    weight: Tensor
    phi: Tensor
    rho: Tensor
    beta: Tensor
    mean: Tensor
    var: Tensor


def problem(case: Case, dtype: torch.dtype = torch.float64) -> Problem:
    c, idx = case.C if case.c is None else case.c, None
    if case.c is not None:
        lists = [torch.randperm(case.C)[:c].sort().values for _ in range(case.samples)]
        idx = torch.stack(lists) if lists else torch.zeros(0, c, dtype=torch.int64)
    shapes = (case.samples, c, *case.image), (case.K, case.C, *case.kernel), (case.K, case.C)
    x, weight, phi = (torch.randn(shape, dtype=dtype) for shape in shapes)
    rho, beta, mean = (torch.randn(case.K, dtype=dtype) for _ in range(3))
    return Problem(x, idx, weight, phi, rho, beta, mean, torch.rand(case.K, dtype=dtype) + 0.1)


def run(kernels: Any, case: Case, p: Problem) -> tuple[Tensor, Tensor | None, Tensor]:
    window = case.stride, case.padding, case.dilation
    result: tuple[Tensor, Tensor | None, Tensor] = kernels.gated_conv2d(
        *p, 1e-3, case.k, *window, case.relu
    )
    return result


def double(p: Problem) -> Problem:
    return Problem(*(t.double() if t is not None and t.is_floating_point() else t for t in p))


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make falling back an error: a comparison of the reference with itself proves nothing."""
    monkeypatch.setattr(ours, "reference", None)


@pytest.mark.usefixtures("no_reference", "threads")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_reference(case: Case) -> None:
    p = problem(case)
    (y, idx, g), (wanted, winners, gates) = run(ours, case, p), run(reference, case, p)
    assert_gradients_close({"y": y, "g": g}, {"y": wanted, "g": gates})
    assert (idx is None) == (case.k == case.K)
    if idx is not None and winners is not None:
        assert_exact(idx, winners)
    assert y.is_contiguous()


@pytest.mark.usefixtures("no_reference", "threads")
@pytest.mark.parametrize("name", ["both", "stem", "all-win", "63-100", "strided", "one-sample"])
def test_float32(name: str) -> None:
    case = CASES[name]
    p = problem(case, torch.float32)
    found, torchs, truth = (
        run(ours, case, p),
        run(reference, case, p),
        run(reference, case, double(p)),
    )
    for i, result in ((0, "y"), (2, "g")):
        values = (found[i], torchs[i], truth[i])
        assert_close_to_float64(*values, result)  # type: ignore[arg-type]
    if case.k < case.K:
        assert_exact(found[1], truth[1])  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize("name", ["both", "one-sample", "rows-divided", "many-samples"])
def test_any_number_of_threads_gives_the_same_bits(name: str, threads: int) -> None:
    case = CASES[name]
    p = problem(case, torch.float32)

    def results() -> list[Tensor]:
        return [t for t in run(ours, case, p) if t is not None]

    assert_reruns_equal(results)
    here = results()
    torch.set_num_threads(3)
    for one, other in zip(results(), here, strict=True):
        assert_exact(one, other)


NAN, INF = torch.nan, torch.inf


@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize(
    "rho",
    [
        [1.0, 2, 2, 2, 1, 3, 0],  # ties go to the lower channel
        [0.0, -1, 0, -2, 0, -3, 4],  # ReLU makes ties
        [NAN, 1, NAN, 5, -1, INF, 2],  # NaN counts as -inf
        [NAN, NAN, 1, NAN, NAN, NAN, NAN],  # and wins where nobody else is left
        [INF, 7, INF, INF, INF, 3, INF],
    ],
)
@pytest.mark.parametrize("k", range(1, 7))
def test_winners_are_those_of_the_definition(rho: list[float], k: int) -> None:
    case = Case(samples=2, K=7, k=k)
    p = problem(case)
    p = p._replace(phi=torch.zeros_like(p.phi), rho=torch.tensor(rho).double())
    y, idx, g = run(ours, case, p)
    gates = p.rho.relu().expand(2, -1).contiguous()
    assert_exact(g, gates)
    assert idx is not None
    assert_exact(idx, k_winners(gates, k)[0])
    torch.testing.assert_close(y, run(reference, case, p)[0], equal_nan=True)


@pytest.mark.usefixtures("no_reference", "threads")
def test_what_is_skipped_is_never_read() -> None:
    case = Case(samples=2, C=20, K=7, c=17, k=3)
    p = problem(case)
    idx = torch.arange(20)[torch.arange(20) % 7 != 3].expand(2, -1)[:, :17].contiguous()
    rho = torch.tensor([0.0, 900, 0, 800, 0, 0, 700]).double()
    p = p._replace(in_idx=idx, rho=rho)
    wanted = run(reference, case, p)
    losers, absent = torch.tensor([0, 2, 4, 5]), torch.tensor([3, 10, 17])
    for tensor in p[2:4]:
        assert tensor is not None
        tensor[:, absent] = NAN
    for tensor in (p.weight, p.beta, p.mean, p.var):
        tensor[losers] = NAN
    y, winners, g = run(ours, case, p)
    assert winners is not None and winners.tolist() == [[1, 3, 6]] * 2
    assert_gradients_close({"y": y, "g": g}, {"y": wanted[0], "g": wanted[2]})


def test_nan_reaches_the_result() -> None:
    """As by a mask: a sum that is NaN stays NaN through the ReLU."""
    case = Case(samples=1)
    p = problem(case)
    p.x[0, 0, 0, 0] = NAN
    y, _, g = run(ours, case, p)
    assert g.isnan().all() and y.isnan().all()


@pytest.mark.parametrize("kind", ["16-bit", "channels-last", "strided-list", "strided-rho"])
def test_what_is_the_reference_s(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["both"]
    p = problem(case, torch.bfloat16 if kind == "16-bit" else torch.float32)
    assert p.in_idx is not None
    if kind == "channels-last":
        p = p._replace(x=p.x.to(memory_format=torch.channels_last))
    elif kind == "strided-list":
        p = p._replace(in_idx=p.in_idx.repeat_interleave(2, 1)[:, ::2])
    elif kind == "strided-rho":
        p = p._replace(rho=p.rho.repeat_interleave(2)[::2])
    asked: list[str] = []
    monkeypatch.setattr(ours, "reference", _Spy(asked))
    found, wanted = run(ours, case, p), run(reference, case, p)
    assert asked
    for value, other in zip(found, wanted, strict=True):
        assert value is not None and other is not None
        assert_exact(value, other)


class _Spy:
    def __init__(self, asked: list[str]) -> None:
        self.asked = asked

    def gated_conv2d(self, *args: Any) -> Any:
        self.asked.append("gated_conv2d")
        return reference.gated_conv2d(*args)


@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize("part", ["weight", "phi", "rho", "beta", "mean", "var"])
def test_every_parameter_counts(part: str) -> None:
    """Two layers' results differ where one parameter does: nothing is kept from another call."""
    case = CASES["both"]
    p = problem(case)
    run(ours, case, p)
    getattr(p, part).mul_(1.5)
    found, wanted = run(ours, case, p), run(reference, case, p)
    assert_gradients_close({"y": found[0], "g": found[2]}, {"y": wanted[0], "g": wanted[2]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_idx": torch.full((3, 5), 9)}, "expected channels below 9 in in_idx, got 9"),
        ({"in_idx": torch.full((3, 5), -1)}, "expected channels below 9 in in_idx, got -1"),
        ({"in_idx": torch.zeros(3, 4, dtype=torch.int64)}, "expected in_idx of 3 times 5 channels"),
        ({"in_idx": None}, "expected all 9 channels without in_idx, got 5"),
        ({"phi": torch.zeros(11, 8).double()}, "expected phi of 11 times 9 values"),
        ({"rho": torch.zeros(10).double()}, "expected rho of 11 values, of x's dtype, got 10"),
        ({"beta": torch.zeros(10).double()}, "expected beta of 11 values"),
        ({"mean": torch.zeros(12).double()}, "expected mean of 11 values"),
        ({"var": torch.zeros(1).double()}, "expected var of 11 values"),
        ({"x": torch.zeros(3, 5, 7).double()}, "expected 4-D tensors on the CPU, got 3-D and 4-D"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"gated_conv2d: {message}"):
        run(ours, CASES["both"], problem(CASES["both"])._replace(**change))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(k=0), r"expected k in \[1, 11\], got 0"),
        (Case(k=12), r"expected k in \[1, 11\], got 12"),
        (Case(stride=(0, 1)), "expected positive strides, dilations and filter sizes"),
    ],
)
def test_refuses_numbers(case: Case, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(ours, case, problem(case))


# --- the layer ------------------------------------------------------------------------------------


def layer_and_input(**options: Any) -> tuple[GatedConv2d, SampleChannels]:
    layer = GatedConv2d(5, 7, 3, density=0.4, dtype=torch.float64, **options).eval()
    odd_case(layer)
    idx = torch.stack([torch.randperm(5)[:3].sort().values for _ in range(4)])
    return layer, SampleChannels(torch.randn(4, 3, 6, 5).double(), idx, 5)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from dcx_kernels.kernels.native import cpu

    made: list[str] = []
    theirs = cpu.gated_conv2d
    monkeypatch.delenv("DCX_BACKEND", raising=False)
    monkeypatch.setattr(cpu, "gated_conv2d", lambda *a: (made.append("call"), theirs(*a))[1])
    return made


@pytest.mark.parametrize("relu", [True, False])
def test_layer_takes_it_in_evaluation(calls: list[str], relu: bool) -> None:
    layer, x = layer_and_input(relu=relu)
    wanted, gate = layer(x).detach(), layer.gate
    assert not calls and gate is not None  # with gradients: operators that have some
    with torch.no_grad():
        found = layer(x)
    assert len(calls) == 1 and layer.gate is not None
    assert_gradients_close({"y": found, "g": layer.gate}, {"y": wanted, "g": gate.detach()})
    layer.norm.running_mean.data.add_(1)  # no version counts this
    layer.rho.data.add_(1)
    wanted = layer(x).detach()
    with torch.inference_mode():
        layer.compact_output = True
        out = layer(x)
    assert len(calls) == 2 and out.values.shape == (4, 3, 4, 3) and out.nonnegative == relu
    assert_gradients_close({"y": out.dense()}, {"y": wanted})


def test_layer_of_an_input_with_strides_does_not(calls: list[str]) -> None:
    """The reference would copy every sample's filters."""
    layer, x = layer_and_input()
    with torch.no_grad():
        wanted = layer(x)
        calls.clear()
        last = x.values.to(memory_format=torch.channels_last)
        assert_gradients_close({"y": layer(x._replace(values=last))}, {"y": wanted})
    assert not calls


@pytest.mark.parametrize(
    "options",
    [{"subsample": "l2"}, {"beta_at": "outside"}, {"execution": "mask"}],
    ids=lambda options: next(iter(options.values())),
)
def test_layer_of_other_options_does_not(calls: list[str], options: dict[str, Any]) -> None:
    layer, x = layer_and_input(**options)
    with torch.no_grad():
        layer(x)
    assert not calls


def test_layer_does_not_where_somebody_looks_on(calls: list[str]) -> None:
    layer, x = layer_and_input()
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() > 0
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.float()(x._replace(values=x.values.float())).dtype == torch.bfloat16
        assert not calls
        layer.train()(x._replace(values=x.values.float()))
    assert not calls
