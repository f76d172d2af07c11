"""Trained weights, wherever they come from, and sentences where they do not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dcx_kernels.errors import CheckpointError
from dcx_kernels.models import build
from dcx_kernels.recipes import DCPConfig, Experiment, run_experiment
from dcx_kernels.recipes.weights import checksum, load_weights
from dcx_kernels.train import checkpoint


def _network(seed: int = 0, classes: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    network = build("resnet20", classes, width=0.25)
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return network


def _same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def _copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("w.pt", lambda state, path: torch.save(state, path)),
        ("w.pth", lambda state, path: torch.save({"state_dict": state, "epoch": 3}, path)),
        ("w.bin", lambda state, path: torch.save({"model": state}, path)),
        ("w.safetensors", lambda state, path: save_file(_copied(state), str(path))),
        ("c.safetensors", lambda state, path: checkpoint.save(path, {"model": dict(state)})),
    ],
    ids=["pt", "state_dict", "model", "safetensors", "checkpoint"],
)
def test_weights_of_every_form(
    tmp_path: Path, name: str, write: Callable[[dict[str, Tensor], Path], None]
) -> None:
    trained, network = _network(1), _network(2)
    write(trained.state_dict(), tmp_path / name)
    assert not _same(trained, network)
    load_weights(network, tmp_path / name)
    assert _same(trained, network)


def test_a_missing_batch_counter_is_no_obstacle(tmp_path: Path) -> None:
    trained, network = _network(1), _network(2)
    state = {k: v for k, v in trained.state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "w.pt")
    load_weights(network, tmp_path / "w.pt")
    assert _same(trained, network)


class _Code:
    """What a pickle may hold that is no weight."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("bn1.weight"), r"bn1.weight of shape \(4,\), got no such entry"),
        (lambda s: s.pop("bn1.running_var"), "bn1.running_var of .*, got no such entry"),
        (lambda s: s.update(extra=torch.zeros(1)), r"extra of no such entry, got shape \(1,\)"),
        (
            lambda s: s.update({"fc.weight": torch.zeros(10, 16)}),
            r"w.pt: expected fc.weight of shape \(4, 16\), got shape \(10, 16\)",
        ),
        (lambda s: s.update(epoch=3), "a state_dict of tensors"),
        (lambda s: s.update(code=_Code()), "holds no weights that can be read"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    state = _copied(_network(1).state_dict())
    change(state)
    torch.save(state, tmp_path / "w.pt")
    network = _network(2)
    with pytest.raises(CheckpointError, match=message):
        load_weights(network, tmp_path / "w.pt")
    assert _same(network, _network(2))


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"trained weights at .*nowhere.pt: no such file"):
        load_weights(_network(), tmp_path / "nowhere.pt")
    (tmp_path / "run").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no trained dense network .*--compare dense"):
        load_weights(_network(), tmp_path / "run")
    for name in ("torn.pt", "torn.safetensors"):
        (tmp_path / name).write_bytes(b"neither")
        with pytest.raises(CheckpointError, match="torn"):
            load_weights(_network(), tmp_path / name)


def test_propagation_starts_from_the_dense_network_of_a_run(
    data_file: Path, tmp_path: Path
) -> None:
    experiment = Experiment(str(data_file), "resnet20", 0.25, compare=("dense",))
    config = DCPConfig(density=0.5, epochs=1, batch_size=16, lr=0.05)
    run_experiment(experiment, config, tmp_path / "base")
    still = dataclasses.replace(config, lr=1e-12, epochs=2, decay=0.7)
    again = dataclasses.replace(experiment, weights=str(tmp_path / "base"))
    run_experiment(again, still, tmp_path / "run")
    base = checkpoint.load(tmp_path / "base/checkpoints/dense/latest.safetensors")["model"]
    for arm in ("sparse", "dense"):
        found = checkpoint.load(tmp_path / f"run/checkpoints/{arm}/latest.safetensors")["model"]
        for name in ("conv1.weight", "layer2.0.conv1.weight", "fc.weight"):
            torch.testing.assert_close(found[name], base[name], rtol=0, atol=1e-9)
    # a run goes on with the weights it began with, under whatever name
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((tmp_path / "base/checkpoints/dense/latest.safetensors").read_bytes())
    moved = dataclasses.replace(experiment, weights=str(copy))
    assert checksum(copy) == checksum(tmp_path / "base")
    run_experiment(moved, still, tmp_path / "run", resume=True)
    torch.save(_network(5).state_dict(), tmp_path / "other.pt")
    for weights in (str(tmp_path / "other.pt"), None):
        other = dataclasses.replace(experiment, weights=weights)
        with pytest.raises(CheckpointError, match="of another run: weights: expected"):
            run_experiment(other, still, tmp_path / "run", resume=True)
