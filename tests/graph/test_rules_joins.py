"""Where channels meet: sums, products, grouped and shared layers, functional forms."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dcx_kernels as dcx
from tiny import Net, between, checked, conv, selectable

# --- where branches meet --------------------------------------------------------------------------


def residual(residual_: str, add: Callable[[Any, Any], Any] = operator.add) -> dcx.ChannelModel:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.relu(m.stem(x))
        x = torch.relu(add(m.back(torch.relu(m.inside(x))), x))
        x = add(m.more(x), x)
        return m.head(m.last(x).mean((2, 3)))

    return checked(
        forward, residual_,
        stem=conv(3, 7), inside=conv(7, 4, 3), back=nn.Sequential(conv(4, 7), nn.BatchNorm2d(7)),
        more=conv(7, 7, 3), last=conv(7, 6), head=nn.Linear(6, 3),
    )  # fmt: skip


ADDS: dict[str, Callable[[Any, Any], Any]] = {
    "operator": operator.add,
    "in_place": operator.iadd,
    "function": torch.add,
    "method": lambda a, b: a.add(b),
}


@pytest.mark.parametrize("add", ADDS)
def test_residual_policies(add: str) -> None:
    kept = residual("keep", ADDS[add])
    assert selectable(kept) == ["inside", "last"]
    reason = "residual add (residual='keep')"
    assert [kept.groups[n].reason for n in ("stem", "back.0", "more")] == [reason] * 3
    tied = residual("tie", ADDS[add])
    assert selectable(tied) == ["stem", "inside", "last"] and "back.0" not in tied.groups
    assert {m.module for m in tied.groups["stem"].members} >= {"stem", "back.0", "more", "last"}
    union = residual("union", ADDS[add])
    assert selectable(union) == ["stem", "inside", "back.0", "more", "last"]
    assert len(union.structure.unions) == 2  # a sum of a sum


def test_a_tie_late_in_the_graph_binds_its_beginning() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = m.a(x), m.b(x)
        y = m.first(a) + m.second(b)
        return m.head((y + m.third(a * b)).mean((2, 3)))

    model = checked(
        forward, "tie", a=conv(3, 5), b=conv(3, 5),
        first=conv(5, 4), second=conv(5, 4), third=conv(5, 4), head=nn.Linear(4, 3),
    )  # fmt: skip
    assert selectable(model) == ["a", "first"]


def test_what_cannot_be_tied_is_kept() -> None:
    """A stream added to itself, shifted by some channels: no set could satisfy that."""

    def forward(m: Any, x: Tensor) -> Tensor:
        a = m.a(x)
        return m.head(m.b(a[:, 1:] + a[:, :-1]).mean((2, 3)))

    layers = {"a": conv(3, 6), "b": conv(5, 4), "head": nn.Linear(4, 3)}
    model = checked(forward, "tie", **layers)
    assert model.groups["a"].reason == "added to channels that it cannot be tied to"
    assert selectable(model) == ["b"]
    assert selectable(checked(forward, "union", **layers)) == ["a", "b"]


def test_an_add_of_an_image_keeps_the_other_side() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.b(m.a(x) + x).mean((2, 3)))

    for policy in ("keep", "tie", "union"):
        model = checked(forward, policy, a=conv(3, 3), b=conv(3, 4), head=nn.Linear(4, 3))
        assert model.groups["a"].selectable == (policy == "union")


def test_a_sum_that_is_read_again_after_it_was_changed_in_place() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = m.a(x), m.b(x)
        c = a.add_(b)
        return m.head(m.c(torch.cat([a, c], 1)).mean((2, 3)))

    layers = {"a": conv(3, 4), "b": conv(3, 4), "c": conv(8, 5), "head": nn.Linear(5, 3)}
    model = checked(forward, **layers)
    assert selectable(model) == ["c"]
    assert model.groups["a"].reason == "changed in place and read again"
    _assert_dense(Net(forward, **layers))


def _assert_dense(dense: nn.Module) -> None:
    """With all channels active nothing may differ from the network as its author wrote it."""
    dense, x = dense.double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for execution in ("sparse", "mask"):
        model = dcx.convert(dense, x, "union", execution, grouped="equal")
        torch.testing.assert_close(model(x), dense(x), rtol=1e-9, atol=1e-12)


def test_squeeze_and_excitation_gates_are_tied_to_what_they_gate() -> None:
    def gate(m: Any, x: Tensor) -> Tensor:
        n, c, _, _ = x.size()
        y = torch.relu(m.fc1(x.mean((2, 3)).view(n, c)))
        return x * torch.sigmoid(m.fc2(y)).view(n, c, 1, 1)

    model = between(gate, fc1=nn.Linear(7, 4), fc2=nn.Linear(4, 7))
    assert selectable(model) == ["a", "b"] and "fc2" not in model.groups
    assert model.groups["fc1"].reason.startswith("fully connected")
    convs = between(
        lambda m, x: torch.mul(m.up(F.silu(m.down(F.adaptive_avg_pool2d(x, 1)))).sigmoid(), x),
        down=conv(7, 3), up=conv(3, 7),
    )  # fmt: skip
    assert selectable(convs) == ["a", "down", "b"]


def test_what_is_expanded_has_the_channels_of_its_model() -> None:
    model = between(
        lambda m, x: m.other(x.mean((2, 3), keepdim=True)).expand_as(x), other=conv(7, 7)
    )
    assert selectable(model) == ["a", "b"] and "other" not in model.groups


def test_concatenation_along_pixels_ties() -> None:
    model = between(lambda m, x: torch.cat([x, m.other(x)], dim=2), other=conv(7, 7))
    assert selectable(model) == ["a", "b"] and "other" not in model.groups


def test_padded_channels_are_absent() -> None:
    """Option A of CIFAR ResNets: a strided shortcut, zero channels on both sides."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 3))
        return m.head(m.c(torch.relu(m.down(x) + short)).mean((2, 3)))

    layers = {
        "a": conv(3, 4), "down": conv(4, 9, 3, stride=2), "c": conv(9, 5), "head": nn.Linear(5, 3)
    }  # fmt: skip
    assert selectable(checked(forward, "union", **layers)) == ["a", "down", "c"]
    for policy in ("keep", "tie"):
        model = checked(forward, policy, **layers)
        assert model.groups["a"].reason == "padded along channels"
        assert selectable(model) == ["c"]


# --- grouped convolutions, shared modules, several outputs ----------------------------------------


def test_grouped_policies() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.c(torch.relu(m.grouped(m.a(x)))).mean((2, 3)))

    layers = {
        "a": conv(3, 6), "grouped": conv(6, 9, 3, groups=3), "c": conv(9, 4),
        "head": nn.Linear(4, 3),
    }  # fmt: skip
    kept = checked(forward, runs="keep", **layers)
    assert selectable(kept) == ["c"]
    assert kept.groups["a"].reason == kept.groups["grouped"].reason
    assert kept.groups["a"].reason == "grouped convolution (grouped)"
    equal = checked(forward, runs="equal", **layers)
    assert selectable(equal) == ["a", "grouped", "c"]
    assert equal.groups["a"].runs == equal.groups["grouped"].runs == 3
    with pytest.raises(ValueError, match="equally many channels in each of 3 runs"):
        equal.set_active({"a": dcx.ChannelSet([0, 1, 2], 6)})


def test_a_shared_convolution_binds_its_inputs() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.cat([m.shared(m.a(x)), m.shared(m.b(x))], 1)
        return m.head(m.c(y).mean((2, 3)))

    model = checked(
        forward, a=conv(3, 5), b=conv(3, 5), shared=conv(5, 4), c=conv(8, 4), head=nn.Linear(4, 3)
    )
    assert selectable(model) == ["a", "shared", "c"] and "b" not in model.groups
    assert model.groups["shared"].members[1].positions == (0, 4, 1, 5, 2, 6, 3, 7)


def test_a_module_shared_by_channels_that_cannot_be_one_is_kept() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        a = m.a(x)
        y = m.norm(a[:, :4]) + m.norm(a[:, 1:])
        return m.head(m.c(y).mean((2, 3)))

    model = checked(
        forward, a=conv(3, 5), norm=nn.BatchNorm2d(4), c=conv(4, 4), head=nn.Linear(4, 3)
    )
    assert model.groups["a"].reason == "norm is shared by channels that cannot be one"
    assert selectable(model) == ["c"]


def test_several_outputs_and_an_auxiliary_head_of_training_only() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        x = torch.relu(m.a(x))
        y = m.head(m.b(x).mean((2, 3)))
        return {"out": y, "features": (x.mean((2, 3)) * 1, m.c(x))} if m.training else {"out": y}

    model = checked(forward, a=conv(3, 6), b=conv(6, 4), c=conv(6, 5), head=nn.Linear(4, 3))
    reasons = {name: group.reason for name, group in model.groups.items()}
    assert reasons == dict.fromkeys(["a", "c", "head"], "output of the network") | {"b": ""}


def test_a_layer_with_one_name_in_two_places() -> None:
    block = nn.Sequential(conv(4, 4, 3), nn.ReLU())
    model = checked(
        lambda m, x: m.head(m.two(torch.tanh(m.one(m.a(x)))).mean((2, 3))),
        a=conv(3, 4), one=block, two=block, head=nn.Linear(4, 3),
    )  # fmt: skip
    assert selectable(model) == ["a"]


# --- functional forms -----------------------------------------------------------------------------


class NormAct(nn.BatchNorm2d):
    """A batch norm with an activation and a forward of its own, as in timm."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.drop, self.act = nn.Identity(), nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias,
            self.training, self.momentum or 0.0, self.eps,
        )  # fmt: skip
        return self.act(self.drop(x))


class OwnConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class StandardizedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


def test_functional_forms_of_layers_are_these_layers() -> None:
    model = checked(
        lambda m, x: m.head(m.b(m.norm(m.a(x))).mean((2, 3))),
        a=OwnConv(3, 7, 3, 2), norm=NormAct(7), b=conv(7, 4), head=nn.Linear(4, 3),
    )  # fmt: skip
    assert selectable(model) == ["a", "b"]
    assert [m[:2] for m in model.groups["a"].members][:2] == [("a", "producer"), ("norm", "norm")]
    assert type(dcx.revert(model).norm) is NormAct
    assert int(model.state_dict()["norm.num_batches_tracked"]) == 2


def test_functional_forms_that_compute_something_else_are_kept() -> None:
    model = between(lambda m, x: m.own(x), own=StandardizedConv(7, 7, 1))
    assert model.groups["a"].reason == "no rule for conv2d"
    eps = between(
        lambda m, x: F.batch_norm(
            x,
            m.twin.running_mean,
            m.twin.running_var,
            m.twin.weight,
            m.twin.bias,
            m.training,
            m.twin.momentum,
            0.7,
        ),
        twin=nn.BatchNorm2d(7),
    )
    assert eps.groups["a"].reason == "no rule for batch_norm"
