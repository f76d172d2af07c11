"""The thin network goes on where the converted one stopped: momentum, step counts, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import dcx_kernels as dcx
from dcx_kernels.graph.carry import refill
from networks import Chain, Residual, batch, random_sets
from tolerances import assert_exact, assert_gradients_close

Make = Callable[[nn.Module], Optimizer]

MAKERS: dict[str, Make] = {
    "sgd": lambda m: dcx.optim.SGD(
        m, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2, dampening=0.0
    ),
    "dampened": lambda m: dcx.optim.SGD(m, lr=0.05, momentum=0.9, dampening=0.5),
    "adamw": lambda m: dcx.optim.AdamW(m, lr=0.02, weight_decay=0.1, amsgrad=True),
    "torch-sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True),
    "torch-adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.02, fused=True),
}


def _steps(model: nn.Module, optimizer: Optimizer, x: Tensor, t: Tensor, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        F.cross_entropy(model(x), t).backward()
        optimizer.step()


def _trained(
    make: Make,
    network: str = "residual",
    residual: Literal["keep", "tie", "union"] = "keep",
    execution: Literal["sparse", "mask"] = "sparse",
) -> tuple[dcx.ChannelModel, Optimizer, Tensor, Tensor]:
    """Return a model after steps with several selections, then some with the last one."""
    dense, x, t = batch(network)
    model = dcx.convert(dense, x, residual, execution)
    optimizer = make(model)
    for _ in range(3):
        model.set_active(random_sets(model))
        _steps(model, optimizer, x, t, 1)
    _steps(model, optimizer, x, t, 2)
    return model, optimizer, x, t


def _states(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            found[f"{name}.{key}"] = torch.as_tensor(value).double()
    return found


@pytest.mark.parametrize("execution", ["sparse", "mask"])
@pytest.mark.parametrize("residual", ["keep", "tie", "union"])
@pytest.mark.parametrize("maker", MAKERS)
def test_continuing_thin_is_continuing_sparse(maker: str, residual: Any, execution: Any) -> None:
    model, optimizer, x, t = _trained(MAKERS[maker], "residual", residual, execution)
    thin = dcx.compact(model)
    assert sum(p.numel() for p in thin.parameters()) < sum(p.numel() for p in model.parameters())
    carried = dcx.compact_optimizer(optimizer, model, thin)
    assert type(carried).__module__.startswith("torch.optim")
    _steps(model, optimizer, x, t, 3)
    _steps(thin, carried, x, t, 3)
    again = dcx.compact(model)
    assert_gradients_close(thin.state_dict(), again.state_dict())
    wanted = dcx.compact_optimizer(optimizer, model, again)
    assert_gradients_close(_states(thin, carried), _states(again, wanted))


def test_features_of_several_pixels_are_carried_too() -> None:
    model, optimizer, x, t = _trained(MAKERS["sgd"], "chain")
    thin = dcx.compact(model)
    carried = dcx.compact_optimizer(optimizer, model, thin)
    _steps(model, optimizer, x, t, 2)
    _steps(thin, carried, x, t, 2)
    assert_gradients_close(thin.state_dict(), dcx.compact(model).state_dict())


def test_a_fresh_optimizer_would_differ() -> None:
    """What the tests above compare does depend on the state."""
    model, optimizer, x, t = _trained(MAKERS["sgd"])
    thin = dcx.compact(model)
    fresh = torch.optim.SGD(thin.parameters(), 0.05, 0.9, nesterov=True, weight_decay=1e-2)
    _steps(model, optimizer, x, t, 1)
    _steps(thin, fresh, x, t, 1)
    with pytest.raises(AssertionError, match="differ"):
        assert_gradients_close(thin.state_dict(), dcx.compact(model).state_dict())


def test_param_groups_settings_and_pending_gradients() -> None:
    dense, x, t = batch("residual")
    model = dcx.convert(dense, x)
    norms = [p for p in model.parameters() if p.dim() == 1]
    rest = [p for p in model.parameters() if p.dim() > 1]
    optimizer = dcx.optim.SGD(
        model,
        lr=0.1,
        momentum=0.9,
        params=[{"params": norms, "weight_decay": 0.0, "lr": 0.3}, {"params": rest}],
        weight_decay=0.2,
    )
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model.set_active(random_sets(model))
    _steps(model, optimizer, x, t, 1)
    F.cross_entropy(model(x), t).backward()  # its packed leaves show in param_groups
    assert len(optimizer.param_groups[1]["params"]) > len(rest)
    thin = dcx.compact(model)
    carried = dcx.compact_optimizer(optimizer, model, thin)
    first, second = carried.param_groups
    names = {p: n for n, p in thin.named_parameters()}
    of_model = {p: n for n, p in model.named_parameters()}
    assert [names[p] for p in first["params"]] == [of_model[p] for p in norms]
    assert [names[p] for p in second["params"]] == [of_model[p] for p in rest]
    assert (first["lr"], first["weight_decay"], first["initial_lr"]) == (0.3, 0.0, 0.3)
    assert (second["lr"], second["weight_decay"], second["momentum"]) == (0.1, 0.2, 0.9)
    assert carried.defaults["momentum"] == 0.9


def test_state_is_a_copy_with_the_strides_of_the_thin_parameters() -> None:
    model, optimizer, _, _ = _trained(lambda m: torch.optim.SGD(m.parameters(), 0.1, 0.9))
    thin = dcx.compact(model).to(memory_format=torch.channels_last)
    carried = dcx.compact_optimizer(optimizer, model, thin)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    for parameter in thin.parameters():
        buffer = carried.state[parameter]["momentum_buffer"]
        assert buffer.stride() == parameter.stride()
        buffer.zero_()
    for number, entry in optimizer.state_dict()["state"].items():
        assert_exact(entry["momentum_buffer"], before[number]["momentum_buffer"])


class _TwoBranches(nn.Module):
    """Where the first half of the channels is gone, the layer behind it reads nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.left = nn.Conv2d(4, 5, 1)
        self.right = nn.Conv2d(4, 5, 1)
        self.head = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 9, 9) -> (N, 5)."""
        left, right = self.stem(x).chunk(2, 1)
        return self.head((self.left(left) * 2 + self.right(right)).mean((2, 3)))


def test_a_layer_without_inputs() -> None:
    x, t = torch.randn(6, 3, 9, 9).double(), torch.randint(0, 5, (6,))
    model = dcx.convert(_TwoBranches().double(), x, "tie")
    optimizer = MAKERS["sgd"](model)
    _steps(model, optimizer, x, t, 1)
    model.set_active({"stem.0": dcx.ChannelSet([4, 6, 7], 8)})
    _steps(model, optimizer, x, t, 1)
    thin = dcx.compact(model)
    assert thin.left.weight.shape == (5, 1, 1, 1)
    carried = dcx.compact_optimizer(optimizer, model, thin)
    _steps(model, optimizer, x, t, 2)
    _steps(thin, carried, x, t, 2)
    assert_gradients_close(thin.state_dict(), dcx.compact(model).state_dict())
    kept = model.left.weight.detach().clone()
    refill(model, thin)
    assert_exact(model.left.weight, kept)


@pytest.mark.parametrize("execution", ["sparse", "mask"])
@pytest.mark.parametrize("residual", ["keep", "tie", "union"])
def test_refill_is_the_inverse_of_compact(residual: Any, execution: Any) -> None:
    model, optimizer, x, t = _trained(MAKERS["sgd"], "residual", residual, execution)
    thin = dcx.compact(model)
    before = copy.deepcopy(model)
    _steps(thin, dcx.compact_optimizer(optimizer, model, thin), x, t, 2)
    refill(model, thin)
    again = dcx.compact(model)
    for name, tensor in thin.state_dict().items():
        assert_exact(again.state_dict()[name], tensor, name)
    others = {n: _complement(s) for n, s in model.active.items() if not s.is_full}
    for m in (model, before):
        m.set_active(others)
    for name, parameter in dcx.compact(before).named_parameters():
        if any(member.module == name.rpartition(".")[0] for n in others
               for member in model.groups[n].of_role("norm")):  # fmt: skip
            assert_exact(dcx.compact(model).get_parameter(name), parameter, name)


def _complement(channels: dcx.ChannelSet) -> dcx.ChannelSet:
    rest = (~channels.mask()).nonzero().flatten()
    return dcx.ChannelSet(rest, channels.num_channels)


class TestErrors:
    """Both values are in the sentence, and nothing has changed."""

    @pytest.fixture
    def model(self) -> dcx.ChannelModel:
        model = dcx.convert(Chain(), torch.zeros(2, 3, 9, 9))
        model.set_active({"stem": dcx.ChannelSet([0, 3], 7)})
        return model

    @pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.RMSprop])
    def test_unknown_optimizer(
        self, model: dcx.ChannelModel, make: Callable[[Iterable[Tensor]], Optimizer]
    ) -> None:
        optimizer = make(model.parameters())
        with pytest.raises(TypeError, match=rf"SGD or AdamW .*got {make.__name__}"):
            dcx.compact_optimizer(optimizer, model, dcx.compact(model))

    def test_subclass_of_a_known_optimizer(self, model: dcx.ChannelModel) -> None:
        class Mine(torch.optim.SGD):
            """Its step may be anything."""

        with pytest.raises(TypeError, match="got Mine"):
            dcx.compact_optimizer(Mine(model.parameters()), model, dcx.compact(model))

    def test_optimizer_of_another_model(self, model: dcx.ChannelModel) -> None:
        other = dcx.optim.SGD(dcx.convert(Residual(), torch.zeros(2, 3, 9, 9)))
        with pytest.raises(ValueError, match=r"parameters of this 15-p.*shape \(8, 3, 3, 3\)"):
            dcx.compact_optimizer(other, model, dcx.compact(model))

    def test_thin_network_of_other_channels(self, model: dcx.ChannelModel) -> None:
        optimizer, thin = dcx.optim.SGD(model), dcx.compact(model)
        model.set_active({"stem": dcx.ChannelSet([0, 3, 5], 7)})
        before = copy.deepcopy(model.state_dict())
        message = r"stem\.weight of shape \(3, 3, 3, 3\) .*got \(2, 3, 3, 3\)"
        with pytest.raises(ValueError, match=message):
            dcx.compact_optimizer(optimizer, model, thin)
        with pytest.raises(ValueError, match=message):
            refill(model, thin)
        for name, tensor in model.state_dict().items():
            assert_exact(tensor, before[name], name)

    def test_thin_network_of_another_architecture(self, model: dcx.ChannelModel) -> None:
        with pytest.raises(ValueError, match=r"stem\.weight of .*got no such parameter"):
            dcx.compact_optimizer(dcx.optim.SGD(model), model, nn.Linear(2, 2))

    def test_models_of_the_wrong_kind(self, model: dcx.ChannelModel) -> None:
        optimizer = dcx.optim.SGD(model)
        with pytest.raises(TypeError, match="made by convert, got Chain"):
            dcx.compact_optimizer(optimizer, Chain(), dcx.compact(model))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="made by compact, got ChannelModel"):
            dcx.compact_optimizer(optimizer, model, model)
