"""Feature boosting and suppression and network slimming, end to end on a tiny network."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dcx_kernels.data import eval_loader, load, train_loader
from dcx_kernels.graph import convert, cost
from dcx_kernels.models import m_cifarnet
from dcx_kernels.recipes.fbs import FBSConfig, divided_every, train_fbs
from dcx_kernels.recipes.run import Run
from dcx_kernels.recipes.slimming import SlimmingConfig, slim, slim_sets, train_slimming
from dcx_kernels.recipes.stages import Loaders
from dcx_kernels.train.interrupt import Interrupt
from tolerances import assert_exact, assert_gradients_close

CONFIG = FBSConfig(density=0.5, steps=4, warm_epochs=1, epochs=1, lr=0.01, count_batches=1)


@pytest.fixture
def loaders(data_file: Path) -> Loaders:
    data = load(str(data_file))
    train = train_loader(data, 16, augment="none", seed=0)
    return Loaders(train=train, plain=train, test=eval_loader(data, 24))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return m_cifarnet(num_classes=4, width=1 / 16)


def test_densities_go_down_with_warm_starts(loaders: Loaders, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, init="fold")
    dense = network()
    before = {n: v.clone() for n, v in dense.state_dict().items()}
    model, points = train_fbs(dense, loaders, config, Run(tmp_path))
    assert [p.density for p in points] == [1.0, 0.75, 0.5]
    assert {layer.density for layer in model.gated.values()} == {0.5}
    macs = [p.cost.macs for p in points]
    assert macs[0] > macs[1] > macs[2] and macs[2] < 0.35 * macs[0]
    assert all(0 <= p.accuracy <= 1 for p in points)
    for name, value in dense.state_dict().items():
        assert_exact(value, before[name], name)
    arms = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert arms == {"fbs-1", "fbs-0.75", "fbs-0.5"}


def test_a_resumed_run_is_bit_identical(
    loaders: Loaders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, wanted = train_fbs(network(), loaders, CONFIG, Run(tmp_path / "whole"))
    calls = []

    def stop(self: Interrupt) -> None:
        calls.append(None)
        if len(calls) == 7:  # in the middle of the second density
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "raise_if_requested", stop)
        with pytest.raises(KeyboardInterrupt):
            train_fbs(network(), loaders, CONFIG, Run(tmp_path / "part", checkpoint_every=1))
    again, found = train_fbs(
        network(), loaders, CONFIG, Run(tmp_path / "part", resume=True, checkpoint_every=1)
    )
    assert found == wanted
    theirs = whole.state_dict()
    for name, value in again.state_dict().items():
        assert_exact(value, theirs[name], name)


def test_the_lasso_is_part_of_the_training_loss(loaders: Loaders, tmp_path: Path) -> None:
    one_step = dataclasses.replace(CONFIG, density=1.0, weight_decay=0.0)
    runs = {}
    for penalty in (0.0, 10.0):
        config = dataclasses.replace(one_step, penalty=penalty)
        model, _ = train_fbs(network(), loaders, config, Run(tmp_path / str(penalty)))
        runs[penalty] = sum(float(layer.rho.detach().sum()) for layer in model.gated.values())
    assert runs[10.0] < runs[0.0]  # the penalty shuts gates


def test_densities_are_computed_not_subtracted() -> None:
    wanted = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
    found = FBSConfig(density=0.1).densities
    assert len(found) == 10 and all(abs(a - b) < 1e-15 for a, b in zip(found, wanted, strict=True))
    assert FBSConfig(density=1.0).densities == (1.0,)


def test_learning_rate_is_divided_every_so_often() -> None:
    factor = divided_every(100)
    assert [factor(e, 300) for e in (0, 99, 100, 199)] == [1, 1, 0.1, 0.1]
    assert factor(299, 300) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, "a density in"),
        ({"steps": 0}, "steps to be a positive whole number, got 0"),
        ({"epochs": True}, "epochs to be a positive whole number, got True"),
        ({"penalty": -1.0}, "penalty of at least 0"),
        ({"lr": 0.0}, "a positive learning rate"),
    ],
)
def test_fbs_settings_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FBSConfig(**options)


# --- network slimming -----------------------------------------------------------------------------


def test_slimming_takes_the_smallest_factors_of_the_whole_network() -> None:
    model = network().double().eval()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for i, norm in enumerate(norms):
            norm.weight.copy_(torch.arange(len(norm.weight)) + 1.0 + 100 * (i != 2))
        norms[2].weight.neg_()  # the magnitude counts
    x = torch.randn(2, 3, 32, 32).double()
    converted = convert(model, x)
    widths = {name: g.num_channels for name, g in converted.groups.items() if g.selectable}
    total = sum(widths.values())
    sets = slim_sets(converted, 3 / total)
    assert sum(len(s) for s in sets.values()) == total - 3
    third = sets["features.conv2"]
    assert third.indices.tolist() == list(range(3, 8))
    # all but one of the third layer's channels would go: its best one stays
    assert slim_sets(converted, 8 / total)["features.conv2"].indices.tolist() == [7]
    thin, kept = slim(model, x, 3 / total)
    with torch.no_grad():
        for norm, name in zip(norms, widths, strict=True):
            norm.weight[~kept[name].mask()] = 0
            norm.bias[~kept[name].mask()] = 0
        assert_gradients_close({"logits": thin.eval()(x)}, {"logits": model(x)})


def test_slimming_and_gates_upon_it(loaders: Loaders, tmp_path: Path) -> None:
    config = SlimmingConfig(pruned=0.3, sparse_epochs=1, finetune_epochs=1)
    sparse, thin = train_slimming(network(), loaders, config, Run(tmp_path / "ns"))
    x, _ = next(iter(loaders.test.batches(0)))
    assert cost(thin.model, x[:1]).params < cost(sparse.model, x[:1]).params
    kinds = {type(module) for module in thin.model.modules()}
    assert nn.Conv2d in kinds and not any("Sparse" in kind.__name__ for kind in kinds)
    model, points = train_fbs(thin.model, loaders, CONFIG, Run(tmp_path / "fbs"))
    assert len(model.gated) == 8 and not model.kept
    widths = [layer.out_channels for layer in model.gated.values()]
    assert thin.sets is not None and widths == [len(s) for s in thin.sets.values()]
    assert points[-1].density == 0.5


def test_l1_shrinks_the_factors(loaders: Loaders, tmp_path: Path) -> None:
    sums = {}
    for l1 in (0.0, 1e-1):
        model = network()
        config = SlimmingConfig(
            l1=l1, sparse_epochs=1, finetune_epochs=0, weight_decay=0.0, pruned=0.0
        )
        train_slimming(model, loaders, config, Run(tmp_path / str(l1)))
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        sums[l1] = sum(float(n.weight.detach().abs().sum()) for n in norms)
    assert sums[1e-1] < sums[0.0]


def test_slimming_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"pruned in \[0, 1\), got 1.0"):
        SlimmingConfig(pruned=1.0)
    with pytest.raises(ValueError, match="sparse_epochs to be a positive whole number, got 0"):
        SlimmingConfig(sparse_epochs=0)
