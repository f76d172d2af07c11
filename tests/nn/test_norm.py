"""SparseChannelBatchNorm2d: nn.BatchNorm2d of the active channels; what is inactive rests."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from channel_helpers import backward, channels, leaf
from dcx_kernels import ChannelSet, SparseChannelBatchNorm2d
from tolerances import assert_exact, assert_gradients_close

OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": None},
    {"momentum": 0.3, "eps": 0.1},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False, "momentum": None},
]


def _ids(options: dict[str, Any]) -> str:
    return "-".join(f"{k}={v}" for k, v in options.items()) or "defaults"


def _pair(**options: Any) -> tuple[SparseChannelBatchNorm2d, nn.BatchNorm2d]:
    """Return a sparse and a dense norm of 7 channels with equal, independent, random values."""
    dense = nn.BatchNorm2d(7, **options).double()
    for name, value in dense.state_dict().items():
        if name != "num_batches_tracked":
            value.copy_(torch.rand(7) + 0.5)
    sparse = SparseChannelBatchNorm2d(7, **options).double()
    sparse.load_state_dict(dense.state_dict())
    return sparse, dense


def _run(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = leaf(x)
    module.zero_grad()
    y = module(x)
    upstream = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)
    found = {"y": y.detach(), **backward(y, upstream, {"x": x, **dict(module.named_parameters())})}
    return found | {n: b.clone().double() for n, b in module.named_buffers()}


@pytest.mark.parametrize("listed", [False, True], ids=["None", "listed"])
@pytest.mark.parametrize("options", OPTIONS, ids=_ids)
def test_norm_with_all_channels_equals_torch(options: dict[str, Any], listed: bool) -> None:
    sparse, dense = _pair(**options)
    sparse.set_active(ChannelSet.full(7) if listed else None)
    for mode in (True, True, False, True):
        sparse.train(mode)
        dense.train(mode)
        x = torch.randn(4, 7, 3, 2).double()
        assert_gradients_close(_run(sparse, x), _run(dense, x))


@pytest.mark.parametrize("options", OPTIONS, ids=_ids)
def test_norm_with_changing_sets_equals_torch_on_slices(options: dict[str, Any]) -> None:
    sparse, dense = _pair(**options)
    for mode, wanted in ((True, 3), (True, 1), (True, 7), (False, 3), (True, [2, 6])):
        active = channels(wanted, 7)
        idx, resting = active.indices, ~active.mask()
        before = {n: t.detach().clone() for n, t in sparse.state_dict().items()}
        thin = nn.BatchNorm2d(len(idx), **options).double().train(mode)
        state = {n: v[idx] if v.dim() else v for n, v in dense.state_dict().items()}
        thin.load_state_dict({n: v.clone() for n, v in state.items()})
        x = torch.randn(4, len(idx), 3, 2).double()
        got = _run(sparse.train(mode).set_active(active), x)
        expected = _run(thin, x)
        small = {n: v[idx] if n not in ("x", "y") and v.dim() else v for n, v in got.items()}
        assert_gradients_close(small, expected)
        for name in ("weight", "bias"):
            assert name not in got or got[name][resting].eq(0).all()
        for name in ("running_mean", "running_var"):
            if name in got:
                assert_exact(got[name][resting], before[name][resting], name)
        with torch.no_grad():
            for name, value in thin.state_dict().items():
                target = dense.state_dict()[name]
                target[idx if target.dim() else ...] = value


def test_norm_relu_is_fused() -> None:
    sparse, dense = _pair()
    sparse.relu = True
    x = torch.randn(4, 7, 3, 2).double()
    y, expected = sparse(x), dense(x).relu()
    assert_gradients_close({"y": y}, {"y": expected})
    assert (y == 0).any()


def test_norm_follows_track_running_stats_as_torch() -> None:
    sparse, dense = _pair()
    x = torch.randn(4, 7, 3, 2).double()
    for mode in (True, False):
        for module in (sparse, dense):
            module.train(mode).track_running_stats = False
        assert_gradients_close(_run(sparse, x), _run(dense, x))


def test_norm_counts_batches() -> None:
    sparse, _ = _pair()
    sparse.set_active(ChannelSet([1, 2], 7))
    x = torch.randn(4, 2, 3, 2).double()
    for expected, mode in ((1, True), (2, True), (2, False), (3, True)):
        sparse.train(mode)(x)
        assert int(sparse.num_batches_tracked) == expected


def test_norm_names_layer_and_values() -> None:
    sparse, _ = _pair()
    sparse.layer_name = "stem.norm"
    with pytest.raises(ValueError, match=r"stem.norm: expected a 4-D input, got 3-D"):
        sparse(torch.randn(4, 7, 3).double())
    with pytest.raises(ValueError, match=r"stem.norm: expected more than 1 value per channel"):
        sparse(torch.randn(1, 7, 1, 1).double())
    sparse.eval()(torch.randn(1, 7, 1, 1).double())
    sparse.set_active(ChannelSet([0, 3], 7))
    with pytest.raises(ValueError, match=r"stem.norm: x: expected x with 2 channels, got \(1, 7,"):
        sparse(torch.randn(1, 7, 1, 1).double())
    with pytest.raises(ValueError, match=r"stem.norm: expected active of 7 channels, got 8"):
        sparse.set_active(ChannelSet([0], 8))
    with pytest.raises(
        TypeError, match=r"stem.norm: expected a ChannelSet or None for active, got"
    ):
        sparse.set_active([0])


def test_norm_has_torchs_repr_and_state_dict() -> None:
    sparse, dense = _pair()
    sparse.set_active(ChannelSet([0, 3], 7))
    assert repr(sparse) == f"SparseChannel{dense!r}"
    assert list(sparse.state_dict()) == list(dense.state_dict())
    sparse(torch.randn(4, 2, 3, 2).double())
    dense.load_state_dict(sparse.state_dict())
    for name, value in sparse.state_dict().items():
        assert_exact(dense.state_dict()[name], value, name)


def test_norm_from_dense_shares() -> None:
    _, dense = _pair()
    sparse = SparseChannelBatchNorm2d.from_dense(dense.eval(), relu=True)
    assert sparse.weight is dense.weight and sparse.running_var is dense.running_var
    assert sparse.relu and not sparse.training
    with pytest.raises(TypeError, match="expected a BatchNorm2d, got SyncBatchNorm"):
        SparseChannelBatchNorm2d.from_dense(nn.SyncBatchNorm(3))
    dense.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="without hooks"):
        SparseChannelBatchNorm2d.from_dense(dense)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_norm_copies(how: str) -> None:
    sparse, _ = _pair()
    sparse.set_active(ChannelSet([0, 3], 7))
    sparse.relu = True
    again = copy.deepcopy(sparse) if how == "deepcopy" else pickle.loads(pickle.dumps(sparse))
    x = torch.randn(4, 2, 3, 2).double()
    expected = _run(sparse, x)
    for name, value in _run(again, x).items():
        assert_exact(value, expected[name], name)
    assert again.running_mean is not sparse.running_mean


def test_norm_leaves_compact_gradients_when_asked() -> None:
    sparse, _ = _pair()
    active = ChannelSet([0, 3, 6], 7)
    twin = copy.deepcopy(sparse)
    x = torch.randn(4, 3, 3, 2).double()
    twin.set_active(active)(x).pow(3).sum().backward()
    sparse.set_active(active)
    for slot in sparse.slots().values():
        slot.compact = True
    sparse(x).pow(3).sum().backward()
    assert sparse.weight.grad is None and sparse.bias.grad is None
    for name, slot in sparse.slots().items():
        gradient = slot.gradient()
        assert gradient.out_active is active and gradient.in_active is None
        assert_exact(gradient.tensor, getattr(twin, name).grad[active.indices], name)
