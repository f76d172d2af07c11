"""Native batch norm equals the reference's in every layout: statistics, gradients, saliency."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcx_kernels.kernels import reference
from dcx_kernels.kernels.native import load
from tolerances import assert_close_to_float64, assert_exact, assert_reruns_equal

if (lacking := load("cpu")) is not None:
    pytest.skip(f"the native library of CPUs is {lacking}", allow_module_level=True)

from dcx_kernels.kernels.native.cpu import batch_norm

SHAPES = {
    "odd": (5, 37, 3, 3),
    "one-channel": (3, 1, 9, 7),
    "one-sample": (1, 3, 17, 5),
    "planes": (3, 17, 33, 11),
    "large-planes": (1, 2, 40, 63),
    "many-rows": (17, 63, 8, 9),
    "wide": (4, 700, 2, 3),
    "line": (6, 7, 31),
    "matrix": (29, 63),
    "pixel": (9, 100, 1, 1),
    "cube": (2, 3, 3, 5, 4),
}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
COPIED = ["strided", "transposed", "samples_inside"]  # forms that the library copies
FORMS = ["contiguous", "channels_last", "padded", "padded_last", *COPIED]
NAMES = ["y", "mean", "invstd", "running_mean", "running_var", "dx", "dweight", "dbias", "saliency"]
Run = dict[str, Tensor]


def _lay(x: Tensor, form: str, padding: int = 5) -> Tensor:
    """Return x in a form of memory, between NaN that must not be read."""
    last = form.endswith("last") and x.dim() == 4
    layout = torch.channels_last if last else torch.contiguous_format
    if form == "strided":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
        wide[..., ::2] = x
        return wide[..., ::2]
    if form in COPIED:
        dims = (-1, -2) if form == "transposed" else (0, 1)
        return x.transpose(*dims).contiguous().transpose(*dims)
    if not form.startswith("padded"):
        return x.contiguous(memory_format=layout)
    wide = x.new_full((x.shape[0], x.shape[1] + padding, *x.shape[2:]), float("nan"))
    wide = wide.contiguous(memory_format=layout)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def _inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    channels = shape[1]
    running = torch.randn(2, channels + 4)
    vectors = torch.randn(2, channels).to(dtype)
    x, dy = (torch.randn(shape) * 2 + 1).to(dtype), torch.randn(shape).to(dtype)
    if x.numel():
        h = F.batch_norm(x.double(), None, None, *vectors.double(), training=True, eps=1e-3)
        dy[h.abs() < 1e-5] = 0  # rounding decides on which side of ReLU's zero they are
    return {
        "x": x,
        "dy": dy,
        "weight": vectors[0],
        "bias": vectors[1],
        "running_mean": running[0].clone(),
        "running_var": running[1].exp(),
        "active": torch.randperm(channels + 4)[:channels].sort().values,
    }


def _run(
    backend: Any,
    given: dict[str, Tensor],
    forms: tuple[str, str] = ("contiguous", "contiguous"),
    compute: torch.dtype | None = None,
    training: bool = True,
    relu: bool = True,
    per_sample: bool = False,
    without: tuple[str, ...] = (),
) -> Run:
    def get(name: str) -> Tensor | None:
        if name in without:
            return None
        value = given[name].clone()
        return value if compute is None or name == "active" else value.to(compute)

    x, dy = (_lay(given[name] if compute is None else given[name].to(compute), form)
             for name, form in zip(("x", "dy"), forms, strict=True))  # fmt: skip
    weight, bias, active = get("weight"), get("bias"), get("active")
    mean, var = get("running_mean"), get("running_var")
    if x.dtype == torch.float64:
        mean, var = (None if v is None else v.double() for v in (mean, var))
    y, used, invstd = backend.channel_batch_norm_fwd(
        x, weight, bias, mean, var, active, training, 0.3, 1e-3, relu
    )
    kept = y if relu else None
    gradients = backend.channel_batch_norm_bwd(
        dy, x, kept, weight, bias, used, invstd, training, 1e-3, per_sample
    )
    results = (y, used, invstd, mean, var, *gradients)
    return {name: r for name, r in zip(NAMES, results, strict=True) if r is not None}


def _oracle(given: dict[str, Tensor], compute: torch.dtype, **options: Any) -> Run:
    return _run(reference, given, compute=compute, **options)


def _other_orders(given: dict[str, Tensor], **options: Any) -> Iterator[Run]:
    """Yield torch's results with the pixels of every sample in other orders, put back.

    Samples of one pixel have no other order: there the samples themselves are mixed.
    """
    shape = given["x"].shape
    dim = 2 if shape[2:].numel() > 1 else 0
    for _ in range(3):
        flat = {n: given[n].reshape(*shape[:2], -1) for n in ("x", "dy")}
        order = torch.randperm(flat["x"].shape[dim])
        back = order.argsort()
        found = _oracle(
            {**given, **{n: v.index_select(dim, order) for n, v in flat.items()}},
            torch.float32,
            **options,
        )
        for name, value in found.items():
            if name in ("y", "dx"):
                found[name] = value.index_select(dim, back).view(shape)
            elif value.dim() == 2 and dim == 0:  # the saliency of every sample
                found[name] = value[back]
        yield found


def _compare(
    given: dict[str, Tensor], forms: tuple[str, str] = ("contiguous", "contiguous"), **options: Any
) -> None:
    dtype = given["x"].dtype
    actual = _run(batch_norm, given, forms, **options)
    truth = _oracle(given, torch.float64, **options)
    # of half precision torch's error is that of rounding what float32 gives
    same = _oracle(given, torch.float32, **options)
    for other in _other_orders(given, **options):  # one order's error may be chance
        for name, value in other.items():
            further = (value - truth[name]).abs() > (same[name] - truth[name]).abs()
            same[name] = torch.where(further, value, same[name])
    assert actual.keys() == truth.keys()
    for name, value in actual.items():
        if dtype == torch.float64:
            rounded = truth[name]
        else:
            rounded = same[name].to(dtype if name in ("y", "dx") else torch.float32)
        assert_close_to_float64(value, rounded, truth[name], name)
    x = _lay(given["x"], forms[0])
    if forms[0] not in COPIED:
        assert actual["y"].stride() == actual["dx"].stride() == x.stride()
    if forms[0].startswith("padded"):
        for name in ("y", "dx"):
            assert _padding(actual[name], x.shape[1] + 5).eq(0).all(), name


def _padding(t: Tensor, channels: int) -> Tensor:
    whole = t.as_strided((t.shape[0], channels, *t.shape[2:]), t.stride())
    return whole[:, t.shape[1] :]


@pytest.mark.parametrize("per_sample", [False, True], ids=["batch", "sample"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_training(shape: tuple[int, ...], form: str, per_sample: bool) -> None:
    _compare(_inputs(shape), (form, form), per_sample=per_sample)


@pytest.mark.parametrize("per_sample", [False, True], ids=["batch", "sample"])
@pytest.mark.parametrize("form", ["contiguous", "padded", "padded_last"])
@pytest.mark.parametrize("shape", [(4, 301, 9, 13), (2, 66, 33, 32), (1, 9001, 3, 3)], ids=str)
def test_tasks_are_parts_of_rows_and_slices_of_channels(
    shape: tuple[int, ...], form: str, per_sample: bool
) -> None:
    given = _inputs(shape, torch.float64)
    actual = _run(batch_norm, given, (form, form), per_sample=per_sample)
    truth = _oracle(given, torch.float64, per_sample=per_sample)
    for name, value in actual.items():
        assert_close_to_float64(value, truth[name], truth[name], name)


@pytest.mark.parametrize("form", ["contiguous", "padded_last"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_dtypes(dtype: torch.dtype, relu: bool, form: str) -> None:
    for shape in ((3, 17, 2, 4), (3, 19, 20, 15)):
        given = _inputs(shape, dtype)
        for per_sample in (False, True):
            _compare(given, (form, form), relu=relu, per_sample=per_sample)


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_evaluation_is_the_references_to_the_last_bit(relu: bool) -> None:
    given = _inputs((3, 17, 2, 4))
    found = _run(batch_norm, given, training=False, relu=relu)
    for name, wanted in _run(reference, given, training=False, relu=relu).items():
        assert_exact(found[name], wanted, name)


@pytest.mark.parametrize("of_dy", FORMS)
@pytest.mark.parametrize("of_x", FORMS)
def test_gradient_in_any_layout(of_x: str, of_dy: str) -> None:
    _compare(_inputs((3, 19, 4, 5)), (of_x, of_dy), per_sample=True)


@pytest.mark.parametrize("of_y", FORMS)
@pytest.mark.parametrize("of_x", FORMS)
def test_output_in_any_layout(of_x: str, of_y: str) -> None:
    """Of backward, which is given x and y: nothing says that they lie alike."""
    given = _inputs((3, 19, 4, 5), torch.float64)
    x, dy = _lay(given["x"], of_x), _lay(given["dy"], "channels_last")
    vectors = torch.randn(19).double(), torch.rand(19).double()
    y = dy.roll(1, 0).relu()
    args = (None, None, *vectors, True, 1e-3, True)
    found = batch_norm.channel_batch_norm_bwd(dy, x, _lay(y, of_y), *args)
    # dh h is summed over y, which here is no function of x
    for value, wanted in zip(found, reference.channel_batch_norm_bwd(dy, x, y, *args), strict=True):
        assert_close_to_float64(value, wanted, wanted)


@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
def test_expanded_gradient(form: str) -> None:
    x = _lay(torch.randn(3, 5, 4, 4), form)
    y, mean, invstd = batch_norm.channel_batch_norm_fwd(
        x, None, None, None, None, None, True, 0.1, 1e-5, True
    )
    args = (x, y, None, None, mean, invstd, True, 1e-5, False)
    found = batch_norm.channel_batch_norm_bwd(torch.ones(1).expand(x.shape), *args)
    expected = batch_norm.channel_batch_norm_bwd(torch.ones(x.shape), *args)
    for value, wanted in zip(found, expected, strict=True):
        assert_exact(value, wanted)


@pytest.mark.parametrize("per_sample", [False, True], ids=["batch", "sample"])
@pytest.mark.parametrize("without", ["weight", "bias", "active", "running", "both"])
def test_what_may_be_none(without: str, per_sample: bool) -> None:
    given = _inputs((3, 17, 3, 2))
    names = {"running": ("running_mean", "running_var"), "both": ("weight", "bias")}
    if without == "active":
        given = {n: v[:17] if n.startswith("running") else v for n, v in given.items()}
    forms = ("channels_last", "channels_last")
    _compare(given, forms, without=names.get(without, (without,)), per_sample=per_sample)


def test_inactive_statistics_stay_and_are_not_read() -> None:
    given = _inputs((3, 5, 3, 2))
    rest = torch.ones(9, dtype=torch.bool).index_fill(0, given["active"], False)
    for training in (True, False):
        for name in ("running_mean", "running_var"):
            given[name][rest] = float("nan")
        actual = _run(batch_norm, given, training=training)
        for name in ("y", "mean", "invstd", "dx", "saliency"):
            assert actual[name].isfinite().all(), name
        for name in ("running_mean", "running_var"):
            left = rest | (not training)
            assert_exact(actual[name][left], given[name][left], name)
            if training:
                assert actual[name][~rest].ne(given[name][~rest]).all()


@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(4, 3, 9, 8), (2, 3, 40, 50)], ids=str)
@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_large_mean(mean: float, shape: tuple[int, ...], form: str) -> None:
    given = _inputs(shape)
    given["x"] = given["x"] + mean
    actual, truth = _run(batch_norm, given, (form, form)), _oracle(given, torch.float64)
    for name in ("mean", "invstd", "running_mean", "running_var", "y"):
        value = truth[name].float()
        assert torch.allclose(actual[name], value, rtol=4e-7, atol=1e-6), name
    # the mean backward is given is a float32
    for name in ("dweight", "dx"):
        error = (actual[name].double() - truth[name]).norm() / truth[name].norm()
        assert error < 2e-7 * mean, name


@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
def test_far_outlier_where_the_pivot_is_taken(form: str) -> None:
    """A black border or a dead start must not cost accuracy."""
    given = _inputs((4, 3, 9, 8))
    given["x"][0] = 1e3
    _compare(given, (form, form))


def test_nan_passes_and_stays_in_its_channel() -> None:
    given = _inputs((3, 5, 4, 4))
    given["x"][1, 2, 0, 0] = float("nan")
    actual, expected = _run(batch_norm, given), _oracle(given, torch.float32)
    for name, value in expected.items():
        assert torch.equal(actual[name].isnan(), value.isnan()), name
    assert actual["y"].isnan().any() and actual["y"][:, 0].isfinite().all()


def test_infinity_stays_in_its_channel() -> None:
    given = _inputs((3, 5, 4, 4))
    given["x"][0, 2, 0, 0], given["x"][0, 3, 0, 2] = float("inf"), -float("inf")
    actual, expected = _run(batch_norm, given), _oracle(given, torch.float32)
    assert actual["mean"][2:4].tolist() == [float("inf"), -float("inf")]
    for name, value in expected.items():
        assert torch.equal(actual[name].isnan(), value.isnan()), name
        assert torch.equal(actual[name].isinf(), value.isinf()), name


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradient_passes_where_the_output_is_nan(training: bool) -> None:
    x, dy, y = torch.randn(3, 2, 5, 3, 3, dtype=torch.float64).unbind()
    y[0, 1] = float("nan")
    vectors = torch.zeros(5).double(), torch.ones(5).double()
    args = (x, y, None, None, *vectors, training, 1e-5, False)
    found = batch_norm.channel_batch_norm_bwd(dy, *args)
    wanted = reference.channel_batch_norm_bwd(dy, *args)
    for value, other in zip(found[:3], wanted[:3], strict=True):
        assert_close_to_float64(value, other, other)
    if not training:
        assert_exact(found[0][0, 1], dy[0, 1])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradient_is_zero_where_the_output_is(training: bool) -> None:
    given = _inputs((2, 3, 4, 4))
    for name, value in (("x", 0.5), ("running_mean", 0.5), ("bias", 0.0)):
        given[name].fill_(value)
    actual = _run(batch_norm, given, training=training)
    assert actual["y"].eq(0).all()
    assert actual["dbias"].eq(0).all() and actual["dx"].eq(0).all()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(0, 5, 4, 4), (2, 5, 0, 4), (3, 0, 2, 2)], ids=str)
def test_empty(shape: tuple[int, ...], training: bool) -> None:
    given = _inputs(shape)
    actual = _run(batch_norm, given, training=training)
    for name, value in _run(reference, given, training=training).items():
        assert_exact(actual[name], value, name)
    assert_exact(actual["running_mean"], given["running_mean"])


def test_half_precision_is_the_reference() -> None:
    given = _inputs((2, 5, 3, 2))
    given = {n: v.half() if n in ("x", "dy") else v for n, v in given.items()}
    actual = _run(batch_norm, given)
    for name, value in _run(reference, given).items():
        assert_exact(actual[name], value, name)


@pytest.mark.parametrize("form", ["contiguous", "padded", "channels_last"])
def test_reruns_and_threads_are_bit_equal(form: str) -> None:
    given = _inputs((8, 33, 16, 17))

    def run() -> list[Tensor]:
        results = _run(batch_norm, given, (form, form))
        return [
            *results.values(),
            _run(batch_norm, given, (form, form), per_sample=True)["saliency"],
        ]

    assert_reruns_equal(run)
    threads, several = torch.get_num_threads(), run()
    torch.set_num_threads(1)
    try:
        for value, wanted in zip(run(), several, strict=True):
            assert_exact(value, wanted)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"active": torch.tensor([0, 1, 9])}, "active channels that exist, got 9"),
        ({"active": torch.tensor([0, 1])}, "an index for every channel"),
        ({"weight": torch.ones(4)}, "expected 3, got 4"),
    ],
    ids=["range", "count", "weight"],
)
def test_wrong_arguments_write_nothing(change: dict[str, Tensor], message: str) -> None:
    given = {**_inputs((2, 3, 4, 4)), **change}
    mean, var = given["running_mean"].clone(), given["running_var"].clone()
    args = (given["weight"], given["bias"], mean, var, given["active"], True, 0.1, 1e-5, True)
    with pytest.raises(RuntimeError, match=message):
        batch_norm.channel_batch_norm_fwd(given["x"], *args)
    assert_exact(mean, given["running_mean"])
    assert_exact(var, given["running_var"])
