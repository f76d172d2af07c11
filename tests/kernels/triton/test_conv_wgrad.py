"""Weight gradients of convolutions by Triton, against the reference in float64.

Most operands are halves and quarters, of which sums are exact: results must be so to the bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcx_kernels.kernels import reference, tiles
from dcx_kernels.kernels.norm import Norm, NormGrad
from dcx_kernels.kernels.reference import sample_convolution
from tolerances import assert_close_to_float64, assert_exact, assert_reruns_equal

conv_wgrad = pytest.importorskip("dcx_kernels.kernels.triton.conv_wgrad")

LOW = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *LOW]
POINT = ((1, 1), (1, 1), (0, 0), (1, 1))
PAIR = ((1, 2), (1, 1), (0, 1), (1, 1))
PLAIN = ((3, 3), (1, 1), (1, 1), (1, 1))
# k, c, groups
GROUPS = {"one": (5, 3, 1), "groups": (6, 4, 2), "depthwise": (3, 3, 3), "multiplier": (6, 3, 3)}


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fill fresh memory with NaN, and keep fp32 exact on a GPU."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    with torch.backends.cudnn.flags(enabled=True, benchmark_limit=None, allow_tf32=False):
        yield
    torch.use_deterministic_algorithms(False)


def _inside(x: Tensor, spare: int = 3, before: int = 2) -> Tensor:
    """Return x as a view into channels-last memory full of NaN."""
    n, c, h, w = x.shape
    around = x.new_full((n, c + spare, h + 2, w + 1), torch.nan)
    around = around.contiguous(memory_format=torch.channels_last)
    view = around[:, before : before + c, 1 : 1 + h, :w]
    return view.copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nhwc": lambda x: x.contiguous(memory_format=torch.channels_last),
    "nchw": lambda x: x.contiguous(),
    "inside": _inside,
    "transposed": lambda x: x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2),
}


def _exact(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randint(-4, 5, shape, device=device) / 2


def _problem(
    channels: tuple[int, int, int],
    geometry: tuple,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    image: tuple[int, int, int] = (2, 5, 6),
    draw: Callable[..., Tensor] = _exact,
) -> tuple[Tensor, Tensor]:
    k, c, groups = channels
    n, h, w = image
    kernel, stride, padding, dilation = geometry
    x = draw((n, c, h, w), device=device).to(dtype)
    weight = torch.empty(k, c // groups, *kernel, device="meta")
    y = F.conv2d(x.to("meta", torch.float32), weight, None, stride, padding, dilation, groups)
    assert y.numel()
    return draw(tuple(y.shape), device=device).to(dtype), x


def _check(dw: Tensor, dy: Tensor, x: Tensor, geometry: tuple, groups: int) -> None:
    """Require what the reference makes of these operands in float64, rounded once."""
    truth = reference.channel_conv2d_wgrad(dy.double(), x.double(), *geometry, groups)
    assert dw.is_contiguous()
    assert_exact(dw, truth.to(dw.dtype).contiguous())


GEOMETRIES = {
    f"{r}x{s}-stride{stride}-pad{padding}-dilation{dilation}": (
        ((r, s), (stride, stride), (padding, padding), (dilation, dilation)), index
    )
    for index, ((r, s), stride, padding, dilation) in enumerate(
        itertools.product([(1, 1), (3, 3), (3, 5)], [1, 2, 3], [0, 2], [1, 2])
    )
}  # fmt: skip


@pytest.mark.parametrize(("geometry", "index"), GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_geometry(geometry: tuple, index: int, device: torch.device) -> None:
    """Every geometry, with channels and layouts in turn."""
    channels = list(GROUPS.values())[index % 4]
    dy_layout, x_layout = list(LAYOUTS.values())[index // 4 % 4], list(LAYOUTS.values())[index % 3]
    dy, x = _problem(channels, geometry, device, image=(2, 5, 9))
    dw = conv_wgrad.channel_conv2d_wgrad(dy_layout(dy), x_layout(x), *geometry, channels[2])
    _check(dw, dy, x, geometry, channels[2])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("channels", GROUPS.values(), ids=GROUPS.keys())
def test_low_precision(
    channels: tuple[int, int, int],
    layout: Callable[[Tensor], Tensor],
    device: torch.device,
) -> None:
    geometry = ((2, 2), (2, 1), (1, 0), (1, 2))
    dtype = LOW[channels[0] % 2]
    dy, x = _problem(channels, geometry, device, dtype)
    dw = conv_wgrad.channel_conv2d_wgrad(layout(dy), layout(x), *geometry, channels[2])
    assert dw.dtype == dtype
    _check(dw, dy, x, geometry, channels[2])


WIDTHS = {
    "1": (1, 1, 1),
    "1-of-3": (1, 3, 1),
    "3-of-1": (3, 1, 1),
    "8": (8, 8, 1),
    "8-of-6": (8, 6, 1),
    "17-of-63": (17, 63, 1),
    "130-of-70": (130, 70, 1),
    "70-of-130": (70, 130, 1),
    "depthwise-65": (65, 65, 65),
    "depthwise-16": (16, 16, 16),
    "multiplier-24": (24, 8, 8),
    "groups-8": (16, 32, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", WIDTHS.values(), ids=WIDTHS.keys())
def test_widths(channels: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    dy, x = _problem(channels, POINT, device, dtype, (2, 4, 5))
    nhwc = LAYOUTS["nhwc"]
    dw = conv_wgrad.channel_conv2d_wgrad(nhwc(dy), nhwc(x), *POINT, channels[2])
    _check(dw, dy, x, POINT, channels[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [(17, 63, 1), (65, 65, 65)], ids=["product", "depthwise"])
def test_accuracy(channels: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    dy, x = _problem(channels, POINT, device, dtype, (2, 7, 9), torch.randn)
    dw = conv_wgrad.channel_conv2d_wgrad(dy, x, *POINT, channels[2], splits=2)
    expected = reference.channel_conv2d_wgrad(dy, x, *POINT, channels[2])
    truth = reference.channel_conv2d_wgrad(dy.double(), x.double(), *POINT, channels[2])
    assert_close_to_float64(dw, expected, truth)


@pytest.mark.parametrize(("spare", "before"), [(8, 8), (8, 0), (4, 2), (4, 1), (1, 0)])
def test_wide_loads_stay_inside(spare: int, before: int, device: torch.device) -> None:
    """Channels that a wide load could read beyond, or from the wrong address, are NaN."""
    dy, x = _problem((8, 16, 1), PLAIN, device, torch.bfloat16, (2, 3, 4))
    inside = [_inside(tensor, spare, before) for tensor in (dy, x)]
    _check(conv_wgrad.channel_conv2d_wgrad(*inside, *PLAIN, 1), dy, x, PLAIN, 1)


@pytest.mark.parametrize("channels", [(3, 3, 1), (3, 3, 3)], ids=["product", "depthwise"])
@pytest.mark.parametrize("splits", [1, 2, 3, 1000])
def test_splits(splits: int, channels: tuple[int, int, int], device: torch.device) -> None:
    dy, x = _problem(channels, PAIR, device, torch.bfloat16, (3, 5, 7))
    dw = conv_wgrad.channel_conv2d_wgrad(dy, x, *PAIR, channels[2], splits=splits)
    _check(dw, dy, x, PAIR, channels[2])


def test_reruns_equal(device: torch.device) -> None:
    dy, x = _problem((5, 4, 1), POINT, device, torch.float32, (3, 5, 7), torch.randn)
    assert_reruns_equal(
        lambda: [conv_wgrad.channel_conv2d_wgrad(dy, x, *POINT, 1, splits=s) for s in (1, 3)]
    )


def test_splits_round_once(device: torch.device) -> None:
    """Partial sums that cancel: rounded to fp16 in between, nothing would be left."""
    dy = torch.ones(1, 1, 1, 48, dtype=torch.float16, device=device)
    x = torch.full_like(dy, 128.0)
    x[..., 16:32], x[..., 32:] = 2.0**-9, -128.0
    dw = conv_wgrad.channel_conv2d_wgrad(dy, x, *POINT, 1, splits=3)
    assert_exact(dw, torch.full_like(dw, 2.0**-5))


@pytest.mark.parametrize("k", [1, 3, 17])
@pytest.mark.parametrize("entries", [1, 36, 3_000_000])
@pytest.mark.parametrize("pixels", [1, 15, 49, 1024, 1_000_003])
@pytest.mark.parametrize("segments", [1, 64])
def test_cut_covers_all_pixels(k: int, entries: int, pixels: int, segments: int) -> None:
    tile = tiles.wgrad_tile(pixels * segments, k, entries, 2)
    pair = (1, 1)
    product = conv_wgrad._Product(pair, pair, pair, pair, 1, k, entries, 1, 0, tile)
    cut = conv_wgrad._cut(product, segments, pixels, None)
    assert (cut.parts - 1) * cut.length < pixels <= cut.parts * cut.length
    assert cut.length % tile.rows == 0
    assert cut.parts == 1 or cut.parts * 4 * product.entries <= conv_wgrad._PARTIAL_BYTES


# --- fused operands -------------------------------------------------------------------------------


def _vectors(count: int, channels: int, device: torch.device) -> list[Tensor]:
    return [torch.randint(-2, 3, (channels,), device=device) / 2 for _ in range(count)]


def _norm(channels: int, device: torch.device) -> Norm:
    return Norm(*_vectors(3, channels, device))


def _grad(kind: str, dy: Tensor) -> NormGrad:
    center, slope, offset, scale, shift = _vectors(5, dy.shape[1], dy.device)
    norm = None if kind == "before" else Norm(scale, center, shift)
    return NormGrad(
        _exact(tuple(dy.shape), dy.device).to(dy.dtype), center, slope, offset, norm, kind == "relu"
    )


def _wide(value: object) -> object:
    """Convert all tensors within to float64."""
    if isinstance(value, Tensor):
        return value.double()
    if isinstance(value, Norm | NormGrad):
        return type(value)(*[_wide(part) for part in value])
    return value


def _behind(x: Tensor, norm: Norm) -> Tensor:
    scale, center, shift = (vector[:, None, None] for vector in norm)
    return ((x - center) * scale + shift).relu()


def _before(dy: Tensor, grad: NormGrad) -> Tensor:
    """Write down what NormGrad documents."""
    if grad.norm is not None:
        scale, center, shift = (vector[:, None, None] for vector in grad.norm)
        active = (grad.y - center) * scale + shift > 0
        dy = dy * scale * (active if grad.relu else 1)
    centered = grad.y - grad.center[:, None, None]
    return dy + centered * grad.slope[:, None, None] + grad.offset[:, None, None]


@pytest.mark.parametrize("channels", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize("kind", ["none", "before", "behind", "relu"])
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
def test_fused_operands(
    channels: tuple[int, int, int], kind: str, normed: bool, device: torch.device
) -> None:
    geometry = ((2, 1), (1, 2), (1, 1), (1, 1))
    dtype = DTYPES[len(kind) % 3]
    dy, x = _problem(channels, geometry, device, dtype, (2, 5, 4))
    norm = _norm(channels[1], device) if normed else None
    grad = None if kind == "none" else _grad(kind, dy)
    if grad is not None:
        grad = grad._replace(y=_inside(grad.y))
    dw = conv_wgrad.channel_conv2d_wgrad(
        _inside(dy, 2, 0), x, *geometry, channels[2], x_norm=norm, dy_grad=grad, splits=2
    )
    z = x.double() if norm is None else _behind(x.double(), _wide(norm))
    g = dy.double() if grad is None else _before(dy.double(), _wide(grad))
    assert_exact(g, g.to(dtype).double())  # so that rounding operands changes nothing
    assert_exact(z, z.to(dtype).double())
    _check(dw, g, z, geometry, channels[2])


@pytest.mark.parametrize("kind", ["before", "behind", "relu"])
def test_float64_falls_back(kind: str, device: torch.device) -> None:
    dy, x = (tensor.double() for tensor in _problem((5, 3, 1), PLAIN, device))
    norm, grad = _wide(_norm(3, device)), _wide(_grad(kind, dy))
    dw = conv_wgrad.channel_conv2d_wgrad(dy, x, *PLAIN, 1, x_norm=norm, dy_grad=grad)
    _check(dw, _before(dy, grad), _behind(x, norm), PLAIN, 1)


EMPTY = {
    "batch": ((0, 3, 4, 4), (0, 5, 4, 4), 1, (5, 3, 3, 3)),
    "inputs": ((2, 0, 4, 4), (2, 5, 4, 4), 1, (5, 0, 3, 3)),
    "outputs": ((2, 3, 4, 4), (2, 0, 4, 4), 1, (0, 3, 3, 3)),
    "depthwise": ((2, 0, 4, 4), (2, 0, 4, 4), 0, (0, 1, 3, 3)),
}


@pytest.mark.parametrize(("x", "dy", "groups", "shape"), EMPTY.values(), ids=EMPTY.keys())
def test_empty(x: tuple, dy: tuple, groups: int, shape: tuple, device: torch.device) -> None:
    tensors = torch.randn(dy, device=device), torch.randn(x, device=device)
    dw = conv_wgrad.channel_conv2d_wgrad(*tensors, *PLAIN, groups)
    assert_exact(dw, torch.zeros(shape, device=device))


# --- channels of each sample's own ----------------------------------------------------------------

# N, C, K, c, k; None: all
SAMPLES = {
    "both": (3, 5, 7, 3, 4),
    "in": (3, 5, 4, 2, None),
    "out": (2, 3, 7, None, 4),
    "neither": (2, 3, 4, None, None),
    "one": (2, 4, 3, 1, 1),
    "one-sample": (1, 17, 9, 5, 8),
}


def _sample_problem(
    counts: tuple,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    geometry: tuple = PLAIN,
    draw: Callable[..., Tensor] = _exact,
) -> tuple:
    n, all_in, all_out, c, k = counts

    def lists(count: int | None, channels: int) -> Tensor | None:
        if count is None:
            return None
        return torch.rand(n, channels, device=device).argsort(1)[:, :count].sort(1).values

    channels = (all_out if k is None else k, all_in if c is None else c, 1)
    dy, x = _problem(channels, geometry, device, dtype, (n, 5, 4), draw)
    return (
        dy,
        x,
        (all_out, all_in, *geometry[0]),
        lists(c, all_in),
        lists(k, all_out),
        *geometry[1:],
    )


def _check_samples(dw: Tensor, problem: tuple) -> None:
    dy, x, *rest = problem
    truth = sample_convolution.sample_conv2d_wgrad(dy.double(), x.double(), *rest)
    assert dw.is_contiguous()
    assert_exact(dw, truth.to(dw.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("counts", SAMPLES.values(), ids=SAMPLES.keys())
def test_samples(counts: tuple, dtype: torch.dtype, device: torch.device) -> None:
    geometry = ((1, 2), (2, 1), (1, 2), (1, 2))
    dy, x, *rest = _sample_problem(counts, device, dtype, geometry)
    dw = conv_wgrad.sample_conv2d_wgrad(_inside(dy), _inside(x, 1, 0), *rest)
    _check_samples(dw, (dy, x, *rest))


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("splits", [None, 2])
def test_samples_in_chunks(
    at_once: int, splits: int | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits, however many samples there is room for."""
    problem = _sample_problem((5, 4, 3, 2, 2), device, torch.float32, PAIR, torch.randn)

    def run() -> Tensor:
        return conv_wgrad.sample_conv2d_wgrad(*problem, splits=splits)

    whole = run()
    room = at_once * 4 * (2 * 2 * 2) * (splits or 1)
    monkeypatch.setattr(conv_wgrad, "_PARTIAL_BYTES", room)
    assert_exact(run(), whole)
    assert_reruns_equal(run, times=2)


def test_absent_pairs_are_zero(device: torch.device) -> None:
    dy, x, shape, *_ = _sample_problem((2, 4, 4, 2, 2), device)
    in_idx = torch.tensor([[0, 1], [2, 3]], device=device)
    out_idx = torch.tensor([[3, 0], [0, 3]], device=device)  # any order
    dw = conv_wgrad.sample_conv2d_wgrad(dy, x, shape, in_idx, out_idx, *PLAIN[1:])
    _check_samples(dw, (dy, x, shape, in_idx, out_idx, *PLAIN[1:]))
    assert_exact(dw[1:3], torch.zeros_like(dw[1:3]))
    assert (dw[[0, 3]] != 0).any()


@pytest.mark.parametrize("counts", [(0, 4, 3, 2, 2), (2, 4, 3, 0, 2), (2, 4, 3, 2, 0)], ids=str)
def test_empty_samples(counts: tuple, device: torch.device) -> None:
    n, all_in, all_out, c, k = counts
    dy, x = torch.randn(n, k, 4, 4, device=device), torch.randn(n, c, 4, 4, device=device)
    lists = [torch.arange(m, device=device).expand(n, m) for m in (c, k)]
    dw = conv_wgrad.sample_conv2d_wgrad(dy, x, (all_out, all_in, 3, 3), *lists, *PLAIN[1:])
    assert_exact(dw, torch.zeros(all_out, all_in, 3, 3, device=device))
