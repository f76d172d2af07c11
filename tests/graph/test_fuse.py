"""Which layers of a graph are fused, and that a network with fused layers is the masked one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import dcx_kernels as dcx
from dcx_kernels.nn.conv_norm import ConvNormUnit
from dcx_kernels.train.memory import saved_bytes
from networks import MaskedOracle, batch, random_sets
from tiny import Net, conv
from tolerances import assert_exact, assert_gradients_close


@pytest.fixture(autouse=True)
def _fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCX_FUSE", "1")


def _convert(forward: Any, residual: str = "union", **layers: nn.Module) -> dcx.ChannelModel:
    network = Net(forward, **layers).double()
    return dcx.convert(network, torch.randn(4, 3, 6, 6).double(), residual)


def _units(model: dcx.ChannelModel) -> dict[str, bool]:
    """Return the units of a network's graphs as text, and whether each returns raw values."""
    found: dict[str, bool] = {}
    for unit in model.modules():
        if isinstance(unit, ConvNormUnit):
            inner = unit.forward
            text = unit.extra_repr()

            def spy(x: Any, raw: bool = False, inner: Any = inner, text: str = text) -> Any:
                found[text] = raw
                return inner(x, raw)

            unit.forward = spy
    model(torch.randn(4, 3, 6, 6).double())
    for unit in model.modules():
        unit.__dict__.pop("forward", None)
    return found


def _layers(*names: str, **more: nn.Module) -> dict[str, nn.Module]:
    widths = dict(zip(names, (3, *[7] * (len(names) - 1)), strict=True))
    layers: dict[str, nn.Module] = {name: conv(c, 7, 3) for name, c in widths.items()}
    layers |= {f"n_{name}": nn.BatchNorm2d(7) for name in names}
    return {**layers, "head": nn.Linear(7, 3), **more}


# --- which are fused ------------------------------------------------------------------------------


def test_a_chain_is_left_unactivated_to_its_end() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.n_b(m.b(F.relu(m.n_a(m.a(x))))))
        return m.head(m.c(x).mean((2, 3)))

    model = _convert(forward, **_layers("a", "b", "c"))
    assert _units(model) == {"a, n_a": True, "b, n_b": True, "c": False}


def test_what_others_read_is_stored() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.n_a(m.a(x)))
        y = F.relu(m.n_b(m.b(x)))  # b and the sum read x
        return m.head((x + m.c(F.max_pool2d(y, 1))).mean((2, 3)))

    assert _units(_convert(forward, **_layers("a", "b", "c"))) == {"a, n_a": False, "b, n_b": False}


def test_several_convolutions_may_read_one_norm() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.n_a(m.a(x)))
        return m.head((F.relu(m.n_b(m.b(x))) * m.c(x)).mean((2, 3)))

    model = _convert(forward, **_layers("a", "b", "c"))
    assert _units(model) == {"a, n_a": True, "b, n_b": False, "c": False}


@pytest.mark.parametrize("norm", ["relu6", "no ReLU"])
def test_other_activations_are_stored(norm: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.n_a(m.a(x))
        return m.head(m.b(F.relu6(x) if norm == "relu6" else x).mean((2, 3)))

    assert _units(_convert(forward, **_layers("a", "b"))) == {"a, n_a": False}


@pytest.mark.parametrize(
    "options", [{"padding_mode": "reflect", "padding": 1}, {"padding": "same"}]
)
def test_padding_by_other_rules_is_not_fused(options: dict[str, Any]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.n_a(m.a(x)))
        return m.head(F.relu(m.n_b(m.b(x))).mean((2, 3)))

    layers = _layers("a", "b", b=nn.Conv2d(7, 7, 3, **options))
    assert _units(_convert(forward, **layers)) == {"a, n_a": False}


def _conv_twice(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.n_a(m.a(x)))
    return m.head(F.relu(m.n_b(m.b(m.b(x)))).mean((2, 3)))


def _conv_twice_one_norm(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.n_a(m.a(x)))
    return m.head((F.relu(m.n_b(m.b(x))) * m.b(x * 2)).mean((2, 3)))


def _norm_twice(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.n_b(m.a(x)))
    return m.head(F.relu(m.n_b(m.b(x))).mean((2, 3)))


def _conv_read_twice(m: Any, x: Tensor) -> Tensor:
    x = m.b(F.relu(m.n_a(m.a(x))))
    return m.head((F.relu(m.n_b(x)) * x).mean((2, 3)))


def _norm_skipped_in_eval(m: Any, x: Tensor) -> Tensor:
    x = m.b(F.relu(m.n_a(m.a(x))))
    return m.head((F.relu(m.n_b(x)) if m.training else x).mean((2, 3)))


@pytest.mark.parametrize(
    ("forward", "units"),
    [
        (_conv_twice, {"a, n_a": False}),
        (_conv_twice_one_norm, {"a, n_a": False}),
        (_norm_twice, {}),
        (_conv_read_twice, {"a, n_a": True, "b": False}),
        (_norm_skipped_in_eval, {"a, n_a": True, "b": False}),
    ],
)
def test_layers_that_are_not_alone_with_each_other(forward: Any, units: dict[str, bool]) -> None:
    layers = _layers("a", "b")
    if forward is _norm_twice:
        layers.pop("n_a")
    model = _convert(forward, "tie", **layers)
    assert _units(model) == units
    assert _units(model.eval()) == units
    _train(model, copy.deepcopy(model))


@torch.no_grad()
def test_a_change_in_place_comes_after_the_convolution() -> None:
    """The graph may change what a convolution read before the norm behind it is called."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        y = m.b(x)
        x.add_(1)
        return m.head((m.c(F.relu(m.n_b(y))) + x).mean((2, 3)))

    model = _convert(forward, **_layers("a", "b", "c")).eval()
    assert _units(model) == {"b, n_b": True, "c": False}
    x = torch.randn(4, 3, 6, 6).double()
    assert_gradients_close({"y": model(x)}, {"y": dcx.revert(model)(x)})


def _train(fused: dcx.ChannelModel, plain: dcx.ChannelModel, steps: int = 2) -> None:
    """Train one with and one without fusion, and compare all there is."""
    x, t = torch.randn(4, 3, 6, 6).double(), torch.tensor([0, 1, 2, 0])
    patch = pytest.MonkeyPatch()
    optimizers = [dcx.optim.SGD(model, lr=0.05, momentum=0.9) for model in (fused, plain)]
    for model in (fused, plain):
        model.train()
        model.saliency_reduction = "sample"
    for _ in range(steps):
        seen, sets = [], random_sets(fused)
        for model, forced, optimizer in zip((fused, plain), "10", optimizers, strict=True):
            patch.setenv("DCX_FUSE", forced)
            model.set_active(sets)
            optimizer.zero_grad()
            y = model(x)
            F.cross_entropy(y, t).backward()
            optimizer.step()
            seen.append({"y": y.detach(), **model.state_dict()})
            for kind in ("batch", "sample"):
                seen[-1] |= {f"{kind} {n}": s for n, s in model.saliency(kind).items()}
        assert_gradients_close(*seen)
    patch.undo()


# --- whole networks -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize(
    ("network", "residual"),
    [("chain", "keep"), ("residual", "union"), ("streams", "union"), ("branches", "keep")],
)
def test_training_equals_masked_training(network: str, residual: str, kind: str) -> None:
    """Steps with new sets each: outputs, saliency of both reductions, weights, statistics."""
    dense, x, t = batch(network)
    settings: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-3}
    if kind == "AdamW":
        settings = {"lr": 1e-3, "weight_decay": 0.05, "eps": 1e-4}
    make = getattr(torch.optim, kind)
    oracle = MaskedOracle(dense, x, lambda p: make(p, **settings), "frozen", residual)
    model = dcx.convert(dense, x, residual, saliency="sample")
    optimizer = getattr(dcx.optim, kind)(model, **settings)
    for _ in range(4):
        sets = random_sets(model)
        expected = oracle.step(sets, x, t)
        model.set_active(sets)
        optimizer.zero_grad()
        y = model(x)
        F.cross_entropy(y, t).backward()
        for reduction in ("batch", "sample"):
            assert_gradients_close(model.saliency(reduction), oracle.model.saliency(reduction))
        optimizer.step()
        assert_gradients_close({"y": y.detach()}, {"y": expected.detach()})
    assert_gradients_close(model.state_dict(), oracle.model.state_dict())
    oracle.model.set_active(model.active)
    got, wanted = model.eval()(x), oracle.model.eval()(x)
    assert_gradients_close({"y": got.detach()}, {"y": wanted.detach()})
    thin = dcx.compact(model)
    assert_gradients_close({"y": thin(x).detach()}, {"y": got.detach()})


class Vgg(nn.Sequential):
    """Two convolutions, pooling, two convolutions."""

    def __init__(self) -> None:
        super().__init__(
            *(layer for c, k in ((3, 6), (6, 7)) for layer in _block(c, k)),
            nn.MaxPool2d(2),
            *(layer for c, k in ((7, 8), (8, 6)) for layer in _block(c, k)),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
        )  # fmt: skip


def _block(c: int, k: int) -> list[nn.Module]:
    return [nn.Conv2d(c, k, 3, padding=1, bias=False), nn.BatchNorm2d(k), nn.ReLU(inplace=True)]


def _vgg() -> dcx.ChannelModel:
    return dcx.convert(Vgg().double(), torch.randn(4, 3, 6, 6).double())


def test_the_graph_is_the_same_wherever_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model converted without fusion fuses where it is moved to, and its copies do."""
    monkeypatch.setenv("DCX_FUSE", "0")
    model = _vgg()
    plain, other = copy.deepcopy(model), copy.deepcopy(model)
    monkeypatch.setenv("DCX_FUSE", "1")
    _train(model, plain)
    x = torch.randn(4, 3, 6, 6).double()
    other.load_state_dict(model.state_dict())
    other.set_active(model.active)
    assert_exact(other.eval()(x), model.eval()(x))
    assert list(model.state_dict()) == list(Vgg().state_dict())


def test_less_is_saved_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _vgg()
    model.set_active(random_sets(model, (0.5,)))
    x = torch.randn(16, 3, 6, 6).double()
    bytes_ = {}
    for forced in ("0", "1"):
        monkeypatch.setenv("DCX_FUSE", forced)
        bytes_[forced] = saved_bytes(lambda: model(x), model)
    widths = [len(active) for active in model.active.values()]
    # what the first and the third norm would have returned
    activated = 16 * (widths[0] * 36 + widths[2] * 9) * 8
    assert bytes_["0"] - bytes_["1"] > 0.9 * activated


def test_nan_in_inactive_channels_goes_nowhere() -> None:
    model = _vgg()
    model.set_active(random_sets(model, (0.5,)))
    for name, active in model.active.items():
        gone = ~active.mask()
        for member in model.groups[name].members:
            layer = model.get_submodule(member.module)
            for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
                if tensor.dim() and member.role != "consumer":
                    tensor.data[gone] = float("nan")
                elif tensor.dim() > 1:
                    tensor.data[:, gone.repeat_interleave(member.inner)] = float("nan")
    optimizer = dcx.optim.SGD(model, lr=0.1, momentum=0.9)
    before = {n: int(v.isnan().sum()) for n, v in model.state_dict().items()}
    x = torch.randn(4, 3, 6, 6).double()
    y = model(x)
    y.square().sum().backward()
    optimizer.step()
    assert sum(before.values()) and y.isfinite().all() and model.eval()(x).isfinite().all()
    assert before == {n: int(v.isnan().sum()) for n, v in model.state_dict().items()}
    assert all(s.isfinite().all() for s in model.saliency().values())


# --- torch.compile --------------------------------------------------------------------------------


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("reduction", ["batch", "sample"])
@pytest.mark.usefixtures("_fresh_compiler")
def test_one_compiled_graph_serves_changing_sets(reduction: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.n_b(m.b(F.relu(m.n_a(m.a(x))))))
        return m.head(m.c(x).mean((2, 3)))

    eager = _convert(forward, **_layers("a", "b", "c"))
    eager.saliency_reduction = reduction
    models = [eager, copy.deepcopy(eager)]
    operators: set[str] = set()

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        operators.update(str(node.target) for node in graph.graph.nodes)
        operators.update(
            str(node.target)
            for module in graph.modules()
            if isinstance(module, torch.fx.GraphModule)
            for node in module.graph.nodes
        )
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    counter = CompileCounterWithBackend(backend)
    runs = [eager, torch.compile(models[1], backend=counter, fullgraph=True)]
    optimizers = [dcx.optim.SGD(model, lr=0.05, momentum=0.9) for model in models]
    x, t = torch.randn(4, 3, 6, 6).double(), torch.tensor([0, 1, 2, 0])
    for _ in range(5):
        seen, sets = [], random_sets(eager, (0.01, 0.5, 1.0))
        for model, run, optimizer in zip(models, runs, optimizers, strict=True):
            model.set_active(sets)
            optimizer.zero_grad()
            y = run(x)
            F.cross_entropy(y, t).backward()
            optimizer.step()
            seen.append({"y": y.detach(), **model.saliency(reduction), **model.state_dict()})
        assert_gradients_close(seen[1], seen[0])
    assert counter.frame_count == 1
    assert any("fused_conv2d_fwd" in name for name in operators), operators
