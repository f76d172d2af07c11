"""What no rule understands is kept full-width with a reason, or refused with a sentence."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dcx_kernels as dcx
from dcx_kernels.graph.rules import FUNCTION_RULES, METHOD_RULES, MODULE_RULES, per_channel
from tiny import Forward, Net, between, checked, conv, selectable
from tolerances import assert_exact

# --- refusals -------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Forward, str]] = {
    "layer_norm": (lambda m, x: F.layer_norm(x, (7, 6, 6)), "no rule for layer_norm"),
    "group_norm": (lambda m, x: m.group_norm(x), r"no rule for GroupNorm \(group_norm\)"),
    "softmax": (lambda m, x: x.softmax(1), "no rule for softmax"),
    "permute": (lambda m, x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2), "permute of channels"),
    "transpose": (lambda m, x: x.transpose(1, 2).transpose(1, 2), "transpose of channels"),
    "mean_of_channels": (lambda m, x: x - x.mean(1, keepdim=True), "mean over batch or channels"),
    "mean_of_all": (lambda m, x: x - x.mean(), "mean over batch or channels"),
    "batch": (lambda m, x: x[:1] + x, "no rule for this getitem"),
    "index_list": (lambda m, x: x[:, [0, 1, 2, 3, 4, 6, 5]], "no rule for this getitem"),
    "slice_both": (lambda m, x: torch.cat([x[:, :3, 1:], x[:, 3:, 1:]], 1), "pixels at once"),
    "count": (lambda m, x: x / x.shape[1], "channels reach truediv in an unusual way"),
    "count_of_sizes": (lambda m, x: x * x.size(1) ** -0.5, "channels reach mul in an unusual way"),
    "count_in_product": (lambda m, x: x * (x.shape[1] // 2 * 1.0), "reach mul in an unusual way"),
    "mixed": (lambda m, x: x.view(-1, 6, 7, 6).view(-1, 7, 6, 6), "view mixes channels"),
    "batch_merged": (lambda m, x: x.view(-1, 1, 6, 6).view(-1, 7, 6, 6), "view mixes channels"),
    "fixed": (lambda m, x: x * m.scale, "multiplied by a tensor of fixed width"),
    "fixed_lower": (lambda m, x: x * m.gamma.weight, "multiplied by a tensor of fixed width"),
    "quotient": (lambda m, x: x / (x.abs() + 1), "channels reach truediv in an unusual way"),
    "clamp": (
        lambda m, x: torch.clamp(x, max=x.mean((2, 3), keepdim=True)),
        "channels reach clamp in an unusual way",
    ),
    "transposed": (lambda m, x: m.up(x), "no rule for ConvTranspose2d"),
    "conv1d": (
        lambda m, x: x * m.line(x.mean((2, 3)).unsqueeze(1)).view(-1, 7, 1, 1),
        "view mixes channels|no rule for Conv1d|unsqueeze in an unusual way",
    ),
    "linear_of_pixels": (lambda m, x: m.linear(x), "linear layer over more than two dimensions"),
    "weight_norm": (lambda m, x: m.normed(x), "ParametrizedConv2d|computed anew"),
    "slice_in_place": (
        lambda m, x: torch.cat([x[:, :3].relu_(), x[:, 3:]], 1),
        "changed in place through a slice",
    ),
    "chunks_whole": (lambda m, x: torch.cat(x.chunk(2, 1), 1), "an unusual concatenation"),
    "stack": (lambda m, x: torch.stack([x, x], 1).sum(1), "no rule for stack"),
    "expand": (lambda m, x: x.mean((2, 3), keepdim=True).expand(-1, 7, 6, 6), "no rule for expand"),
    "zeros_like": (lambda m, x: x + torch.zeros_like(x), "no rule for zeros_like"),
    "new_zeros": (lambda m, x: x + x.new_zeros(x.shape[1], 1, 1), "no rule for new_zeros"),
    "roll": (lambda m, x: torch.roll(x, 1, 1), "no rule for roll"),
    "one_for_all": (lambda m, x: x * torch.sigmoid(x[:, :1]), "one channel for all in mul"),
    "numel": (lambda m, x: x / x.numel(), "no rule for numel"),
    "leaf": (lambda m, x: m.leaf(x), r"no rule for ConvTranspose2d \(leaf"),
}


def _refused_layers() -> dict[str, nn.Module]:
    scale = nn.Module()
    scale.weight = nn.Parameter(torch.rand(7, 1, 1))
    return {
        "group_norm": nn.GroupNorm(7, 7),
        "gamma": scale,
        "up": nn.ConvTranspose2d(7, 7, 2, 2),
        "line": nn.Conv1d(1, 1, 3, padding=1),
        "linear": nn.Linear(6, 6),
        "normed": nn.utils.parametrizations.weight_norm(conv(7, 7)),
        "leaf": nn.ConvTranspose2d(7, 7, 1),
    }


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_not_understood_is_kept_with_a_reason(form: str) -> None:
    """And it runs all the same, equal in every execution."""
    forward, reason = REFUSED[form]

    def with_scale(m: Any, x: Tensor) -> Any:
        m.scale = m.gamma.weight.unsqueeze(0)
        return forward(m, x)

    model = between(with_scale, **_refused_layers())
    assert model.groups["a"].reason and not model.groups["a"].selectable
    assert re.search(reason, model.groups["a"].reason), model.groups["a"].reason


def test_a_network_of_which_nothing_is_selectable_converts() -> None:
    model = checked(lambda m, x: m.b(F.layer_norm(m.a(x), (4, 6, 6))), a=conv(3, 4), b=conv(4, 3))
    assert selectable(model) == [] and model.active == {} and model.saliency_reduction == "sample"
    assert {n: g.reason for n, g in model.groups.items()} == {
        "a": "no rule for layer_norm", "b": "output of the network"
    }  # fmt: skip


def test_an_unbatched_image_is_not_misread() -> None:
    dense = Net(lambda m, x: m.b(m.a(x)), a=conv(3, 4), b=conv(4, 3)).double()
    x = torch.randn(3, 6, 6, dtype=torch.float64)
    model = dcx.convert(dense, x)
    assert selectable(model) == []
    assert_exact(model(x), dense(x))


# --- tables ---------------------------------------------------------------------------------------


class Swish(nn.Module):
    """A leaf with data-dependent control flow, which torch.fx cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x) if x.numel() else x


def test_a_reader_extends_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.b(m.act(m.a(x))).mean((2, 3)))

    layers = {"a": conv(3, 6), "act": Swish(), "b": conv(6, 4), "head": nn.Linear(4, 3)}
    x = torch.zeros(2, 3, 6, 6)
    with pytest.raises(ValueError, match=r"cannot be traced.*\(in act, a Swish\).*leaf_modules="):
        dcx.convert(Net(forward, **layers), x)
    name = f"{Swish.__module__}.{Swish.__qualname__}"
    for leaf in (Swish, name):
        kept = dcx.convert(Net(forward, **layers), x, leaf_modules=(leaf,))
        assert kept.groups["a"].reason == "no rule for Swish (act)"
    monkeypatch.setattr("dcx_kernels.graph.trace.LEAF_MODULES", [Swish])
    for key in (Swish, name):
        monkeypatch.setitem(MODULE_RULES, key, per_channel)
        assert selectable(checked(forward, **layers)) == ["a", "b"]
        monkeypatch.delitem(MODULE_RULES, key)


def test_tables_hold_rules_for_functions_and_methods_by_name() -> None:
    assert FUNCTION_RULES["torchvision.ops.stochastic_depth.stochastic_depth"] is per_channel
    assert METHOD_RULES["add"] is not METHOD_RULES["sub"]
    assert all(
        callable(r) for t in (FUNCTION_RULES, METHOD_RULES, MODULE_RULES) for r in t.values()
    )


# --- what cannot be converted ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
def test_hooks_that_a_graph_would_lose_are_refused(kind: str) -> None:
    dense = nn.Sequential(conv(3, 4), nn.Sequential(nn.ReLU(), conv(4, 4)), conv(4, 3))
    getattr(dense[1], f"register_{kind}_hook")(lambda *_: None)
    with pytest.raises(
        ValueError, match=r"Sequential 1: expected no hooks on a container .*Remove"
    ):
        dcx.convert(dense, torch.zeros(1, 3, 4, 4))


def test_a_hook_on_a_kept_layer_runs() -> None:
    dense, seen = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 3)), []
    dense[1].register_forward_hook(lambda *_: seen.append(1))
    model = dcx.convert(dense, torch.zeros(1, 3, 4, 4))
    seen.clear()
    model(torch.zeros(1, 3, 4, 4))
    assert seen == [1]


def test_an_untraceable_model_is_named() -> None:
    net = Net(lambda m, x: m.b(x) if x.sum() > 0 else x, b=conv(3, 4))
    with pytest.raises(
        ValueError, match=r"Net cannot be traced by torch\.fx: .*in the model, a Net"
    ):
        dcx.convert(net, torch.zeros(1, 3, 4, 4))
