"""One tiny network per rule: its channels stay selectable, and sparse is masked is thin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dcx_kernels as dcx
from tiny import Forward, Net, between, checked, conv, selectable

# --- what works on each channel alone -------------------------------------------------------------

PER_CHANNEL: dict[str, Forward] = {
    "function": lambda m, x: F.elu(torch.sigmoid(x)),
    "keyword": lambda m, x: F.relu(input=x),
    "method": lambda m, x: x.tanh().contiguous().clamp(min=-0.5),
    "in_place": lambda m, x: F.silu(x.mul(2).add_(1), inplace=True),
    "avg_pool": lambda m, x: F.avg_pool2d(x, 2),
    "max_pool": lambda m, x: F.max_pool2d(x, 3, 2, 1),
    "adaptive": lambda m, x: F.adaptive_avg_pool2d(x, (2, 3)),
    "interpolate": lambda m, x: F.interpolate(x, size=x.shape[-2:], mode="bilinear"),
    "pad_pixels": lambda m, x: F.pad(x, (1, 0, 2, 1)),
    "pad_reflect": lambda m, x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "mean": lambda m, x: x.mean((-2, -1), keepdim=True),
    "sum": lambda m, x: torch.sum(x, dim=(2, 3), keepdim=True) / 36,
    "amax": lambda m, x: x.amax(3, keepdim=True),
    "numbers": lambda m, x: (2 * x - 0.5) / 3 + 1,
    "square": lambda m, x: -(torch.square(x) ** 2),
    "per_sample": lambda m, x: x * torch.sigmoid(x[:, :, :1, :1] * 0 + 0.5),
    "slice_pixels": lambda m, x: x[:, :, 1:-1, ::2],
    "ellipsis": lambda m, x: x[..., 1:],
    "item_of_pixels": lambda m, x: x[:, :, 0, :].unsqueeze(2),
    "none": lambda m, x: x[:, :, 0, 0][:, :, None, None],
    "squeeze": lambda m, x: x.mean((2, 3), keepdim=True).squeeze(3).unsqueeze(-1),
    "view_own_count": lambda m, x: x.view(x.size(0), x.size(1), -1).unsqueeze(-1),
    "view_minus_one": lambda m, x: x.reshape(x.shape[0], -1, x.shape[2], 6),
    "view_made_count": lambda m, x: x.view(-1, (x.size(1) + 7) // 2, 6 * 6).unsqueeze(3),
    "view_number": lambda m, x: x.mean((2, 3)).view(-1, 7, 1, 1),
    "view_tuple": lambda m, x: torch.reshape(x, (-1, 7, 4, 9)),
    "flatten_pixels": lambda m, x: x.flatten(2).unsqueeze(3),
    "flatten_module": lambda m, x: m.flat(x).unsqueeze(3),
    "unflatten_pixels": lambda m, x: x.unflatten(3, (2, 3)).flatten(3),
    "transpose_pixels": lambda m, x: x.transpose(2, 3),
    "expand_as": lambda m, x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)).expand_as(x),
    "chunk_pixels": lambda m, x: x.chunk(2, 2)[0] + x.chunk(2, dim=-2)[1],
    "split_pixels": lambda m, x: torch.split(x, 4, 3)[0],
    "identity": lambda m, x: m.identity(x),
    "sizes": lambda m, x: x.view(x.shape) if x is None else F.avg_pool2d(x, x.size()[2:]),
}


@pytest.mark.parametrize("form", PER_CHANNEL)
def test_what_works_on_each_channel_alone_leaves_it_selectable(form: str) -> None:
    model = between(PER_CHANNEL[form], flat=nn.Flatten(2), identity=nn.Identity())
    assert selectable(model) == ["a", "b"]


@pytest.mark.parametrize(
    "layer",
    [
        nn.ReLU(True), nn.SiLU(True), nn.Hardswish(True), nn.GELU(), nn.Softplus(), nn.PReLU(),
        nn.PReLU(7, init=0.3), nn.Dropout2d(0.0), nn.MaxPool2d(2), nn.ReflectionPad2d(1),
        nn.UpsamplingNearest2d(scale_factor=2), nn.AdaptiveMaxPool2d(2), nn.BatchNorm2d(7),
        nn.BatchNorm2d(7, affine=False), nn.BatchNorm2d(7, track_running_stats=False),
        nn.Conv2d(7, 7, 3, padding=1, groups=7),
    ],
    ids=lambda layer: repr(layer).replace("(", "-", 1)[:24],
)  # fmt: skip
def test_layers_that_work_on_each_channel_alone(layer: nn.Module) -> None:
    model = between(lambda m, x: m.layer(x), layer=layer)
    assert selectable(model) == ["a", "b"]
    roles = {member.module: member.role for member in model.groups["a"].members}
    if isinstance(layer, nn.Conv2d):
        assert roles["layer"] == "follower"
    if isinstance(layer, nn.PReLU):
        assert ("layer" in roles) == (layer.num_parameters == 7)


def test_a_depthwise_convolution_may_have_several_outputs_per_channel() -> None:
    model = checked(
        lambda m, x: m.head(m.b(m.wide(m.a(x))).mean((2, 3))),
        a=conv(3, 5), wide=conv(5, 15, 3, groups=5), b=conv(15, 4), head=nn.Linear(4, 3),
    )  # fmt: skip
    assert selectable(model) == ["a", "b"]
    wide = model.groups["a"].members[1]
    assert (wide.module, wide.role) == ("wide", "follower") and len(wide.positions) == 15


# --- what moves channels --------------------------------------------------------------------------


def _shuffle(m: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.size()
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


MOVES: dict[str, Forward] = {
    "chunk": lambda m, x: torch.cat(x.chunk(2, 1)[::1] if x is None else [*_two(x)][::-1], 1),
    "split_sizes": lambda m, x: torch.cat(_parts(torch.split(x, [1, 4, 3], 1), 3), dim=1),
    "split_size": lambda m, x: torch.cat(_parts(x.split(3, dim=1), 3), 1),
    "slice": lambda m, x: torch.cat([x[:, 5:], x[:, :5]], 1),
    "stride": lambda m, x: torch.cat([x[:, ::2], x[:, 1::2]], -3),
    "overlap": lambda m, x: torch.cat([x[:, :5], x[:, 5:], x[:, 2:4]], 1)[:, 2:],
    "shuffle": _shuffle,
    "shuffle_numbers": lambda m, x: x.reshape(-1, 4, 2, 6, 6).permute(0, 2, 1, 3, 4).flatten(1, 2),
    "shuffle_permute_list": lambda m, x: _shuffle(
        m, x.unflatten(1, (2, 4)).permute([0, 2, 1, 3, 4]).reshape(x.shape[0], 8, 6, 6)
    ),
    "shuffle_method_of_features": lambda m, x: (
        x
        * x.mean((2, 3))
        .view(-1, 2, 4)
        .transpose(1, 2)
        .flatten(1)
        .view(-1, 8, 1, 1)
        .sigmoid()[:, :8]
    ),
}


def _two(x: Any) -> tuple[Any, Any]:
    first, second = x.chunk(2, 1)
    return first, second


def _parts(parts: Any, count: int) -> list[Any]:
    return [parts[i] for i in range(-1, count - 1)]


@pytest.mark.parametrize("form", [f for f in MOVES if "features" not in f])
def test_channels_that_move_stay_selectable(form: str) -> None:
    model = checked(
        lambda m, x: m.head(m.b(torch.relu(MOVES[form](m, m.norm(m.a(x))))).mean((2, 3))),
        a=conv(3, 8, 3), norm=nn.BatchNorm2d(8), b=conv(8, 5), head=nn.Linear(5, 3),
    )  # fmt: skip
    assert selectable(model) == ["a", "b"]


BRANCHES: dict[str, tuple[nn.Module, int]] = {
    "conv": (conv(4, 3, 3, bias=True), 3),
    "norm": (nn.BatchNorm2d(4), 4),
    "prelu": (nn.PReLU(4), 4),
    "depthwise": (conv(4, 4, 3, groups=4), 4),
    "strided": (nn.Sequential(conv(4, 4, 3, groups=4, stride=1), nn.ReLU(), nn.BatchNorm2d(4)), 4),
}


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_branch_may_lose_all_its_channels(branch: str) -> None:
    """One active channel of eight: a chunk of the network computes nothing, in every execution."""

    def forward(m: Any, x: Tensor) -> Tensor:
        low, high = m.a(x).chunk(2, 1)
        return m.head(torch.cat([m.low(low), m.high(high)], 1).mean((2, 3)))

    low, width = BRANCHES[branch]
    layers = {"a": conv(3, 8), "low": low, "high": conv(4, 3), "head": nn.Linear(width + 3, 3)}
    dense, x = Net(forward, **layers).double(), torch.randn(2, 3, 4, 4).double()
    logits = []
    for execution in ("sparse", "mask"):
        model = dcx.convert(dense, x, execution=execution)
        model.set_active({"a": dcx.ChannelSet([6], 8)})
        model(x).sum().backward()
        model.eval()
        thin = dcx.compact(model)
        logits += [model(x), thin(x)]
        assert dcx.cost(model).params == sum(p.numel() for p in thin.parameters())
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0])


FLATTEN: dict[str, Forward] = {
    "flatten": lambda m, x: torch.flatten(x, 1),
    "method": lambda m, x: x.flatten(start_dim=1),
    "module": lambda m, x: m.flat(x),
    "view": lambda m, x: x.view(x.size(0), -1),
    "view_number": lambda m, x: x.reshape(-1, 7 * 36),
    "view_counts": lambda m, x: x.view(x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]),
    "twice": lambda m, x: x.flatten(2).flatten(1),
    "dropout": lambda m, x: F.dropout(torch.relu(x.flatten(1)), 0.0),
}


@pytest.mark.parametrize("form", FLATTEN)
def test_features_of_several_pixels(form: str) -> None:
    model = checked(
        lambda m, x: m.head(FLATTEN[form](m, m.a(x))),
        a=conv(3, 7, 3), flat=nn.Flatten(), head=nn.Linear(7 * 36, 3),
    )  # fmt: skip
    assert selectable(model) == ["a"]
    assert model.groups["a"].members[1] == ("head", "consumer", 36, range(7))


def test_flattened_maps_of_unlike_sizes_are_concatenated() -> None:
    model = checked(
        lambda m, x: m.head(torch.cat([m.a(x).flatten(1), m.b(x).mean((2, 3))], 1)),
        a=conv(3, 2), b=conv(3, 5), head=nn.Linear(2 * 36 + 5, 3),
    )  # fmt: skip
    assert selectable(model) == ["a", "b"]
