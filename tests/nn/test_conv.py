"""SparseChannelConv2d: nn.Conv2d as long as every channel is active, its slice otherwise."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_modules import module_db

from channel_helpers import backward, channels, leaf, masked_conv2d
from dcx_kernels import ChannelSet, SparseChannelConv2d
from tolerances import assert_exact, assert_gradients_close

CONV = next(info for info in module_db if info.module_cls is nn.Conv2d)
INPUTS = CONV.module_inputs_func(CONV, "cpu", torch.float64, True, True)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 1)},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": "same", "bias": False},
    {"kernel_size": (2, 3), "padding": "valid"},
    {"kernel_size": 3, "groups": 2},
    {"kernel_size": 3, "groups": 4, "padding": 1},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": (1, 2), "padding_mode": "replicate"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "stride": 2},
    {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
    {"kernel_size": (2, 3), "padding": "same", "padding_mode": "reflect", "groups": 2},
]


def _ids(options: dict[str, Any]) -> str:
    return "-".join(f"{k}={v}" for k, v in options.items()).replace(" ", "") or "defaults"


def _pair(**options: Any) -> tuple[SparseChannelConv2d, nn.Conv2d]:
    """Return a sparse and a dense conv (4 to 8 channels) with equal, independent parameters."""
    arguments = {"kernel_size": 3, "dtype": torch.float64, **options}
    sparse, dense = SparseChannelConv2d(4, 8, **arguments), nn.Conv2d(4, 8, **arguments)
    dense.load_state_dict(sparse.state_dict())
    return sparse, dense


def _run(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = leaf(x)
    y = module(x)
    upstream = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)
    return {"y": y.detach(), **backward(y, upstream, {"x": x, **dict(module.named_parameters())})}


@pytest.mark.parametrize("listed", [False, True], ids=["None", "listed"])
@pytest.mark.parametrize("sample", INPUTS, ids=lambda s: f"{s.constructor_input.kwargs}-{s.desc}")
def test_conv_passes_torchs_module_inputs(sample: Any, listed: bool) -> None:
    args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
    sparse = SparseChannelConv2d(*args, **kwargs, dtype=torch.float64)
    dense = nn.Conv2d(*args, **kwargs, dtype=torch.float64)
    dense.load_state_dict(sparse.state_dict())
    if listed:
        sparse.set_active(ChannelSet.full(args[1]), ChannelSet.full(args[0]))
    (x,) = sample.forward_input.args
    assert_gradients_close(_run(sparse, x), _run(dense, x))


def test_torchs_module_inputs_are_there() -> None:
    assert len(INPUTS) >= 4


@pytest.mark.parametrize("options", OPTIONS, ids=_ids)
def test_conv_options_equal_torch(options: dict[str, Any]) -> None:
    sparse, dense = _pair(**options)
    assert_gradients_close(_run(sparse, x := torch.randn(2, 4, 7, 6).double()), _run(dense, x))
    assert_gradients_close(_run(sparse, x[0]), _run(dense, x[0]))


@pytest.mark.parametrize("compact_output", [False, True], ids=["dense-out", "compact-out"])
@pytest.mark.parametrize("compact", [False, True], ids=["dense-in", "compact-in"])
@pytest.mark.parametrize("options", OPTIONS, ids=_ids)
def test_conv_computes_its_slice(
    options: dict[str, Any], compact: bool, compact_output: bool
) -> None:
    sparse, dense = _pair(**options)
    sparse.compact_output = compact_output
    groups = options.get("groups", 1)
    in_ = channels({1: [0, 3], 2: [1, 2], 4: [0, 3]}[groups], 4)
    out = channels({1: [1, 2, 6], 2: [0, 5], 4: [0, 1, 6, 7]}[groups], 8)
    assert sparse.set_active(out, in_) is sparse
    x = torch.randn(2, 4, 7, 6).double()
    got = _run(sparse, x[:, in_.indices] if compact else x)

    class Masked(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x * in_.mask().view(1, -1, 1, 1))
            return y[:, out.indices] if compact_output else y * out.mask().view(1, -1, 1, 1)

    dense.__class__ = Masked
    expected = _run(dense, x)
    if compact:
        expected["x"] = expected["x"][:, in_.indices]
    assert_gradients_close(got, expected)
    resting = ~out.mask()
    assert got["weight"][resting].eq(0).all()
    assert compact_output or got["y"][:, resting].eq(0).all()


def test_conv_unbatched_scatters_the_right_axis() -> None:
    sparse, _ = _pair()
    sparse.set_active(out=channels([1, 6], 8))
    x = torch.randn(4, 5, 5).double()
    y = sparse(x)
    assert y.shape == (8, 3, 3)
    assert_exact(y, sparse(x.unsqueeze(0))[0])


def test_conv_has_torchs_state_dict_both_ways() -> None:
    sparse, dense = SparseChannelConv2d(4, 8, 3), nn.Conv2d(4, 8, 3)
    sparse.set_active(ChannelSet([1], 8), ChannelSet([2], 4))
    assert list(sparse.state_dict()) == ["weight", "bias"] == list(dense.state_dict())
    assert list(SparseChannelConv2d(4, 8, 3, bias=False).state_dict()) == ["weight"]
    sparse.load_state_dict(dense.state_dict())
    assert_exact(sparse.weight.detach(), dense.weight.detach())
    other = nn.Conv2d(4, 8, 3)
    other.load_state_dict(sparse.state_dict())
    assert_exact(other.bias.detach(), dense.bias.detach())
    with pytest.raises(RuntimeError, match="Missing key"):
        sparse.load_state_dict({"weight": dense.weight})


@pytest.mark.parametrize("options", OPTIONS, ids=_ids)
def test_conv_has_torchs_repr(options: dict[str, Any]) -> None:
    sparse, dense = _pair(**options)
    assert repr(sparse) == f"SparseChannel{dense!r}"
    assert sparse.extra_repr() == dense.extra_repr()


def test_conv_starts_as_torch_does() -> None:
    torch.manual_seed(3)
    sparse = SparseChannelConv2d(4, 8, 3)
    torch.manual_seed(3)
    assert_exact(sparse.weight.detach(), nn.Conv2d(4, 8, 3).weight.detach())
    assert isinstance(sparse, nn.Conv2d)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_conv_copies(how: str) -> None:
    sparse, _ = _pair()
    sparse.set_active(ChannelSet([1, 2], 8), ChannelSet([0, 3], 4))
    sparse.saliency_reduction = "batch"
    x = torch.randn(2, 4, 5, 5).double()
    before = _run(sparse, x)
    again = copy.deepcopy(sparse) if how == "deepcopy" else pickle.loads(pickle.dumps(sparse))
    assert again.weight is not sparse.weight
    again.zero_grad()
    for name, value in _run(again, x).items():
        assert_exact(value, before[name], name)
    for name, slot in again.slots().items():
        assert slot.parameter is getattr(again, name)
    again.set_active(ChannelSet([5], 8))
    assert sparse.out_active == ChannelSet([1, 2], 8)


def test_from_dense_shares_parameters() -> None:
    dense = nn.Conv2d(4, 8, 3, stride=2, padding=1, padding_mode="reflect").eval()
    sparse = SparseChannelConv2d.from_dense(dense, compact_output=True)
    assert sparse.weight is dense.weight and sparse.bias is dense.bias
    assert sparse.compact_output and not sparse.training
    assert repr(sparse) == f"SparseChannel{dense!r}"
    x = torch.randn(2, 4, 6, 6)
    assert_exact(sparse(x), dense(x))
    sparse.bias = None
    assert dense.bias is not None
    assert isinstance(SparseChannelConv2d.from_dense(sparse), SparseChannelConv2d)


def test_from_dense_refuses_subclasses_and_hooks() -> None:
    class Scaled(nn.Conv2d):
        pass

    with pytest.raises(TypeError, match="from_dense: expected a Conv2d, got Scaled"):
        SparseChannelConv2d.from_dense(Scaled(1, 1, 1))
    with pytest.raises(TypeError, match="expected a Conv2d, got Linear"):
        SparseChannelConv2d.from_dense(nn.Linear(1, 1))
    for register in ("register_forward_hook", "register_forward_pre_hook",
                     "register_full_backward_hook", "register_full_backward_pre_hook"):  # fmt: skip
        dense = nn.Conv2d(1, 1, 1)
        getattr(dense, register)(lambda *_: None)
        with pytest.raises(ValueError, match="Conv2d: expected a layer without hooks"):
            SparseChannelConv2d.from_dense(dense)


def test_conv_weight_stays_contiguous() -> None:
    model = nn.Sequential(SparseChannelConv2d(4, 8, 3)).to(memory_format=torch.channels_last)
    conv = model[0]
    assert conv.weight.is_contiguous()
    dense = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    assert not dense.weight.is_contiguous()
    assert SparseChannelConv2d.from_dense(dense).weight.is_contiguous()
    conv.set_active(ChannelSet([1, 6], 8), ChannelSet([0, 3], 4))
    x = torch.randn(2, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    y = conv(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    expected = masked_conv2d(x, conv.weight, conv.bias, conv.in_active, conv.out_active)
    assert torch.allclose(y[:, [1, 6]], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("out", "in_", "error", "message"),
    [
        ([1, 2], None, TypeError, "stem.conv: expected a ChannelSet or None for out, got list"),
        (None, torch.tensor([1]), TypeError, "stem.conv: expected a ChannelSet or None for in_"),
        (ChannelSet([1], 4), None, ValueError, "stem.conv: expected out of 8 channels, got 4"),
        (None, ChannelSet([1], 8), ValueError, "stem.conv: expected in_ of 4 channels, got 8"),
        (ChannelSet([0, 1, 4], 8), None, ValueError, "stem.conv: expected equal active out"),
        (ChannelSet([0], 8), ChannelSet([3], 4), ValueError, "stem.conv: expected groups active"),
    ],
)
def test_set_active_refuses(out: Any, in_: Any, error: type[Exception], message: str) -> None:
    conv = SparseChannelConv2d(4, 8, 3, groups=2)
    conv.layer_name = "stem.conv"
    before = ChannelSet([0, 4], 8)
    conv.set_active(before)
    with pytest.raises(error, match=message):
        conv.set_active(out, in_)
    assert conv.out_active is before and conv.in_active is None


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_forward_names_layer_and_counts(mode: str) -> None:
    conv = SparseChannelConv2d(4, 8, 3, padding=1, padding_mode=mode)
    conv.layer_name = "stem.conv"
    with pytest.raises(
        ValueError, match=r"stem.conv: x: expected 4 \(dense\) input .* \(2, 3, 5, 5\)"
    ):
        conv(torch.randn(2, 3, 5, 5))
    conv.set_active(in_=ChannelSet([0, 3], 4))
    message = r"stem.conv: x: expected 4 \(dense\) or 2 \(compact\) .* \(3, 5, 5\)"
    with pytest.raises(ValueError, match=message):
        conv(torch.randn(3, 5, 5))
    for slot in conv.slots().values():
        slot.compact = True
    with pytest.raises(ValueError, match=r"stem.conv: x: expected 4"):
        conv(torch.randn(2, 3, 5, 5))
    with pytest.raises(ValueError, match=r"stem.conv: x: expected 4"):
        conv(torch.randn(4, 5))


def test_forward_after_a_parameter_was_replaced() -> None:
    conv = SparseChannelConv2d(4, 8, 3)
    conv.set_active(ChannelSet([1, 6], 8))
    old = conv.slots()["weight"]
    conv.weight = nn.Parameter(torch.zeros(8, 4, 3, 3))
    assert conv.slots()["weight"] is not old
    assert conv.slots()["weight"].out_active is conv.out_active
    conv.bias = None
    assert set(conv.slots()) == {"weight"}
    assert conv(torch.randn(2, 4, 5, 5)).eq(0).all()


def test_conv_leaves_compact_gradients_when_asked() -> None:
    sparse, dense = _pair(groups=2)
    out, in_ = ChannelSet([0, 1, 5, 6], 8), ChannelSet([1, 2], 4)
    sparse.set_active(out, in_)
    for slot in sparse.slots().values():
        slot.compact = True
    x = torch.randn(2, 4, 5, 5).double()
    sparse(x).square().sum().backward()
    masked_conv2d(x, dense.weight, dense.bias, in_, out, groups=2).square().sum().backward()
    assert sparse.weight.grad is None and sparse.bias.grad is None
    slots = sparse.slots()
    got = {name: slots[name].gradient().tensor for name in slots}
    parameters = dict(dense.named_parameters())
    assert_gradients_close(
        got, {n: slots[n].rows().gather(parameters[n].grad) for n in ("weight", "bias")}
    )
    with torch.no_grad():
        assert torch.allclose(sparse(x)[:, out.indices], masked_conv2d(
            x, dense.weight, dense.bias, in_, out, groups=2
        ))  # fmt: skip
