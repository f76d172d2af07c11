"""SparseChannelLinear: nn.Linear from active features to active features."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dcx_kernels import ChannelSet, SparseChannelLinear
from tolerances import assert_exact, assert_gradients_close

OUT, IN = ChannelSet([1, 4], 6), ChannelSet([0, 3], 5)


def _pair(inner: int = 1, bias: bool = True) -> tuple[SparseChannelLinear, nn.Linear]:
    sparse = SparseChannelLinear(5 * inner, 6, bias=bias, inner=inner).double()
    dense = nn.Linear(5 * inner, 6, bias=bias).double()
    dense.load_state_dict(sparse.state_dict())
    return sparse, dense


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("inner", [1, 4])
def test_linear_with_all_features_equals_torch(inner: int, bias: bool) -> None:
    sparse, dense = _pair(inner, bias)
    x = torch.randn(3, 5 * inner).double()
    assert_gradients_close({"y": sparse(x)}, {"y": dense(x)})
    sparse.set_active(ChannelSet.full(6), ChannelSet.full(5))
    assert_gradients_close({"y": sparse(x)}, {"y": dense(x)})


@pytest.mark.parametrize("slots", [False, True], ids=["dense-grads", "compact-grads"])
@pytest.mark.parametrize("compact", [False, True], ids=["dense-in", "compact-in"])
@pytest.mark.parametrize("inner", [1, 4])
def test_linear_computes_its_slice(inner: int, compact: bool, slots: bool) -> None:
    sparse, dense = _pair(inner)
    assert sparse.set_active(OUT, IN) is sparse
    for slot in sparse.slots().values():
        slot.compact = slots
    columns = IN.mask().repeat_interleave(inner)
    x = torch.randn(3, 5 * inner).double()
    y = sparse(x[:, columns] if compact else x)
    expected = F.linear(x * columns, dense.weight, dense.bias)[:, OUT.indices]
    assert_gradients_close({"y": y}, {"y": expected})
    y.square().sum().backward()
    expected.square().sum().backward()
    wanted = {"weight": dense.weight.grad, "bias": dense.bias.grad}
    if not slots:
        assert_gradients_close({"weight": sparse.weight.grad, "bias": sparse.bias.grad}, wanted)
        return
    assert sparse.weight.grad is None
    got = {name: slot.gradient().tensor for name, slot in sparse.slots().items()}
    wanted = {"weight": wanted["weight"][OUT.indices][:, columns], "bias": wanted["bias"][[1, 4]]}
    assert_gradients_close(got, wanted)


def test_linear_names_layer_and_values() -> None:
    sparse = SparseChannelLinear(20, 6, inner=4)
    sparse.layer_name = "head"
    sparse.set_active(OUT, IN)
    with pytest.raises(ValueError, match=r"head: x: expected 20 \(dense\) or 8 \(compact\) .* 12"):
        sparse(torch.randn(3, 12))
    with pytest.raises(ValueError, match="head: expected in_ of 5 channels, got 20"):
        sparse.set_active(in_=ChannelSet([0], 20))
    with pytest.raises(ValueError, match="head: expected out of 6 channels, got 5"):
        sparse.set_active(IN)
    with pytest.raises(TypeError, match="head: expected a ChannelSet or None for in_, got int"):
        sparse.set_active(in_=3)  # type: ignore[arg-type]
    sparse.set_active()
    with pytest.raises(ValueError, match=r"head: .*20.*|head: .*12.*"):
        sparse(torch.randn(3, 12))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_linear_has_torchs_repr_and_state_dict(bias: bool) -> None:
    sparse, dense = _pair(4, bias)
    assert repr(sparse) == f"SparseChannel{dense!r}"
    assert list(sparse.state_dict()) == list(dense.state_dict())


def test_linear_from_dense_shares() -> None:
    dense = nn.Linear(20, 6).eval()
    sparse = SparseChannelLinear.from_dense(dense, inner=4)
    assert sparse.weight is dense.weight and sparse.inner == 4 and not sparse.training
    with pytest.raises(ValueError, match="from_dense: expected inner to divide 20 features, got 3"):
        SparseChannelLinear.from_dense(dense, inner=3)
    with pytest.raises(TypeError, match="expected a Linear, got NonDynamicallyQuantizableLinear"):
        SparseChannelLinear.from_dense(
            nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2)  # a subclass of nn.Linear
        )


@pytest.mark.parametrize("inner", [0, 3, -4])
def test_linear_refuses_inner(inner: int) -> None:
    with pytest.raises(ValueError, match=f"expected inner to divide 20 features, got {inner}"):
        SparseChannelLinear(20, 6, inner=inner)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_linear_copies(how: str) -> None:
    sparse, _ = _pair(4)
    sparse.set_active(OUT, IN)
    copies: dict[str, Any] = {
        "deepcopy": lambda: copy.deepcopy(sparse),
        "pickle": lambda: pickle.loads(pickle.dumps(sparse)),
    }
    again = copies[how]()
    x = torch.randn(3, 8).double()
    assert_exact(again(x), sparse(x))
    assert again.inner == 4 and again.weight is not sparse.weight
