"""The procedures of the paper, end to end on a tiny network."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import fx

from dcx_kernels.data import load
from dcx_kernels.errors import CheckpointError, DataError
from dcx_kernels.graph import convert, cost, load_compact
from dcx_kernels.models import build
from dcx_kernels.recipes import DCEConfig, Experiment, run_experiment
from dcx_kernels.recipes.networks import build_network
from dcx_kernels.selectors import CUCB
from dcx_kernels.train import checkpoint
from dcx_kernels.train.log import TIMINGS, read_rows
from dcx_kernels.train.loop import Trainer

ARMS = ["dense", "mask", "sparse", "thin"]


def _rows(directory: Path) -> list[dict[str, Any]]:
    rows = read_rows(directory / "log.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def _files(directory: Path) -> dict[str, bytes]:
    """Everything that must come out the same: checkpoints and thin network, byte for byte."""
    paths = sorted(directory.rglob("*.safetensors"))
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def _numbers(directory: Path) -> list[dict[str, Any]]:
    arms = json.loads((directory / "result.json").read_text())["arms"]
    return [{k: v for k, v in arm.items() if not k.endswith("step_ms")} for arm in arms]


def test_two_stage(experiment: Experiment, config: DCEConfig, tmp_path: Path) -> None:
    outcome = run_experiment(experiment, config, tmp_path)
    arms = {arm["arm"]: arm for arm in outcome.result["arms"]}
    assert list(arms) == ARMS
    assert outcome.result == json.loads((tmp_path / "result.json").read_text())
    assert sum(outcome.result["final"].values()) == 172  # half of 344
    assert arms["mask"]["macs"] == arms["dense"]["macs"] > arms["sparse"]["macs"]
    assert arms["mask"]["params"] == arms["dense"]["params"] > arms["sparse"]["params"]
    assert arms["thin"]["macs"] == arms["sparse"]["macs"]
    assert arms["thin"]["params"] == arms["sparse"]["params"]
    assert arms["mask"]["saved_bytes"] > arms["sparse"]["saved_bytes"]
    assert all(arm["step_ms"] > 0 and arm["steps"] == 8 for arm in arms.values())
    assert arms["sparse"]["accuracy_as_trained"] is not None
    assert arms["dense"]["accuracy_as_trained"] is None
    assert arms["dense"]["selecting_step_ms"] is arms["dense"]["selecting_saved_bytes"] is None
    assert arms["mask"]["selecting_saved_bytes"] > 1.5 * arms["sparse"]["selecting_saved_bytes"]
    assert arms["sparse"]["selecting_step_ms"] == arms["sparse"]["step_ms"]
    rows = _rows(tmp_path)
    assert [row["arm"] for row in rows if row["kind"] == "epoch"] == [
        arm for arm in ("sparse", "mask", "dense", "thin") for _ in range(2)
    ]
    lr = [row["lr"] for row in rows if row["kind"] == "epoch" and row["arm"] == "thin"]
    assert lr == [0.05, pytest.approx(0.005)]  # the schedule starts again


def test_sparse_equals_mask_step_by_step(
    experiment: Experiment, config: DCEConfig, tmp_path: Path
) -> None:
    run_experiment(dataclasses.replace(experiment, compare=("mask",)), config, tmp_path)
    rows = _rows(tmp_path)
    sparse, mask = (
        [row for row in rows if row["arm"] == arm and row["kind"] == "step"]
        for arm in ("sparse", "mask")
    )
    # the same initial weights, batches and first selections; later float32 drifts apart
    for a, b in zip(sparse[:2], mask[:2], strict=True):
        assert a["widths"] == b["widths"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_thin_file_is_the_thin_network(
    experiment: Experiment, config: DCEConfig, tmp_path: Path
) -> None:
    outcome = run_experiment(dataclasses.replace(experiment, compare=()), config, tmp_path)
    dense = build("vgg19", 4, width=1 / 16)
    thin = load_compact(tmp_path / "thin.safetensors", dense)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(thin.eval()(images), outcome.thin.eval()(images))
    assert sum(p.numel() for p in thin.parameters()) == outcome.result["arms"][-1]["params"]


def test_single_stage_freezes_the_topology_and_keeps_the_momentum(
    experiment: Experiment, config: DCEConfig, tmp_path: Path
) -> None:
    changes = {"procedure": "single-stage", "epochs": 4, "select_epochs": 2}
    config = dataclasses.replace(config, **changes)
    outcome = run_experiment(dataclasses.replace(experiment, compare=()), config, tmp_path)
    widths = [row["widths"] for row in _rows(tmp_path) if row.get("widths")]
    steps = [row for row in _rows(tmp_path) if row["kind"] == "step"]
    assert len(steps) == 16
    frozen = [row["widths"] for row in steps if row["step"] > 8]
    assert len({json.dumps(w) for w in frozen}) == 1
    assert len({json.dumps(w) for w in widths}) > 1
    assert frozen[0] == outcome.result["final"]
    arms = {arm["arm"]: arm for arm in outcome.result["arms"]}
    logged = read_rows(tmp_path / "log.jsonl")
    times = [row["step_ms"] for row in logged if row["kind"] == "step"]
    assert arms["sparse"]["selecting_step_ms"] == median(times[:8])  # while channels changed
    assert arms["sparse"]["step_ms"] == median(times)
    assert arms["thin"]["step_ms"] is None  # nothing left to train: only cut out
    assert arms["thin"]["accuracy"] == arms["sparse"]["accuracy"]
    saved = checkpoint.load(tmp_path / "checkpoints" / "sparse" / "latest.safetensors")
    assert saved["selector"]["kind"] == "Static"
    assert saved["optimizer"]["state"]["param_groups"][0]["lr"] == pytest.approx(0.0005)


@pytest.mark.parametrize("selector", ["random", "static"])
def test_other_selectors(
    experiment: Experiment, config: DCEConfig, tmp_path: Path, selector: Any
) -> None:
    config = dataclasses.replace(config, selector=selector, epochs=1)
    outcome = run_experiment(dataclasses.replace(experiment, compare=()), config, tmp_path)
    kept = sum(outcome.result["final"].values())
    assert kept == 172
    widths = [row["widths"] for row in _rows(tmp_path) if row.get("widths")]
    assert (len({json.dumps(w) for w in widths}) == 1) == (selector == "static")


def test_channels_last(experiment: Experiment, config: DCEConfig, tmp_path: Path) -> None:
    last = dataclasses.replace(experiment, channels_last=True)
    config = dataclasses.replace(config, epochs=1)
    outcome = run_experiment(last, config, tmp_path)
    weights = [p for p in outcome.thin.parameters() if p.dim() == 4]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    before = _files(tmp_path)
    run_experiment(last, config, tmp_path, resume=True)
    assert _files(tmp_path) == before


def test_without_recalibration(experiment: Experiment, config: DCEConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, recalibrate=False, epochs=1)
    outcome = run_experiment(dataclasses.replace(experiment, compare=()), config, tmp_path)
    assert outcome.result["arms"][0]["accuracy_as_trained"] is None


class _KilledError(Exception):
    """Stands for kill -9: nothing is saved on the way out."""


@pytest.mark.parametrize("case", ["two-stage", "single-stage", "union"])
def test_resume_between_and_within_stages_is_exact(
    experiment: Experiment,
    config: DCEConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    experiment = dataclasses.replace(experiment, compare=("dense",))
    changes: dict[str, Any] = {"procedure": case}
    if case == "union":
        experiment = dataclasses.replace(experiment, model="resnet20", width=0.25)
        changes = {"residual": "union"}
    config = dataclasses.replace(config, epochs=2, select_epochs=1, **changes)
    run_experiment(experiment, config, tmp_path / "straight")

    original: Callable[..., Any] = Trainer._step
    budget = {"left": 0}

    def mortal(self: Trainer, *args: Any) -> Any:
        if budget["left"] == 0:
            raise _KilledError
        budget["left"] -= 1
        return original(self, *args)

    monkeypatch.setattr(Trainer, "_step", mortal)
    directory, attempts = tmp_path / "killed", 0
    while True:  # 3 steps at a time: every stage is met in its middle, and at its ends
        budget["left"] = 3
        attempts += 1
        try:
            run_experiment(experiment, config, directory, resume=True, checkpoint_every=1)
            break
        except _KilledError:
            continue
    assert attempts > 4
    assert _rows(directory) == _rows(tmp_path / "straight")
    assert _files(directory) == _files(tmp_path / "straight")
    assert _numbers(directory) == _numbers(tmp_path / "straight")


def test_resume_refuses_other_settings(
    experiment: Experiment, config: DCEConfig, tmp_path: Path
) -> None:
    experiment = dataclasses.replace(experiment, compare=())
    config = dataclasses.replace(config, epochs=1)
    run_experiment(experiment, config, tmp_path)
    before = _files(tmp_path)
    for change, message in (
        ({"lr": 0.2}, "lr: expected 0.2, got 0.05"),
        ({"density": 0.3}, "density: expected 0.3, got 0.5"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run_experiment(experiment, dataclasses.replace(config, **change), tmp_path, resume=True)
    wider = dataclasses.replace(experiment, width=1 / 8)
    with pytest.raises(CheckpointError, match="width"):
        run_experiment(wider, config, tmp_path, resume=True)
    assert _files(tmp_path) == before


@pytest.fixture
def resnet(experiment: Experiment) -> Experiment:
    return dataclasses.replace(experiment, model="resnet20", width=0.5, compare=())


@pytest.mark.parametrize("residual", ["keep", "union"])
def test_residual_policies_select_other_channels(
    resnet: Experiment, config: DCEConfig, tmp_path: Path, residual: Any
) -> None:
    config = dataclasses.replace(config, residual=residual, epochs=1, finetune_epochs=0)
    result = run_experiment(resnet, config, tmp_path).result
    assert result["config"]["residual"] == residual
    assert ("conv1" in result["channels"]) == (residual == "union")
    total = sum(result["channels"].values())
    assert total == 3 * (8 + 16 + 32) * (1 if residual == "keep" else 2) + (residual == "union") * 8
    assert sum(result["final"].values()) == total // 2


def test_thin_graph_survives_the_disk(
    resnet: Experiment, config: DCEConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, residual="union", epochs=1)
    outcome = run_experiment(resnet, config, tmp_path)
    assert isinstance(outcome.thin, fx.GraphModule)
    thin = load_compact(tmp_path / "thin.safetensors", build("resnet20", 4, width=0.5))
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(thin(images), outcome.thin.eval()(images))
    price, row = cost(thin, images), outcome.result["arms"][-1]
    assert (price.params, price.macs) == (row["params"], row["macs"])
    assert price.activation_bytes == row["activation_bytes"]


def test_resume_refuses_another_residual_policy(
    resnet: Experiment, config: DCEConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, residual="tie", epochs=1, finetune_epochs=0)
    run_experiment(resnet, config, tmp_path)
    before = _files(tmp_path)
    other = dataclasses.replace(config, residual="union")
    with pytest.raises(CheckpointError, match="residual: expected 'union', got 'tie'"):
        run_experiment(resnet, other, tmp_path, resume=True)
    assert _files(tmp_path) == before
    run_experiment(resnet, config, tmp_path, resume=True)
    assert _files(tmp_path) == before


def test_torchvision_network_trains_with_a_tied_stream(
    experiment: Experiment, config: DCEConfig, tmp_path: Path
) -> None:
    changes = {"model": "mobilenet_v3_small", "width": 1.0, "compare": ()}
    config = dataclasses.replace(config, epochs=1, residual="tie", recalibrate=False)
    outcome = run_experiment(dataclasses.replace(experiment, **changes), config, tmp_path)
    assert {arm["arm"]: arm["steps"] for arm in outcome.result["arms"]} == {"sparse": 4, "thin": 4}
    assert outcome.thin.eval()(outcome.example).shape == (1, 4)
    kept = convert(build_network("mobilenet_v3_small", 4), outcome.example).groups
    assert "add" in kept["features.3.block.2.0"].reason
    first = "features.2.block.2.0"  # the tied group is called by its first layer
    assert not kept[first].selectable
    assert first in outcome.result["channels"]


def test_bad_experiments(config: DCEConfig, data_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compare to be out of"):
        Experiment(compare=("dance",))
    for change, message in (
        ({"model": "vgg99"}, "vgg99"),
        ({"device": "gpu!"}, "expected a device such as cpu or cuda:0, got 'gpu!'"),
        ({"width": -1.0}, "width"),
    ):
        with pytest.raises(ValueError, match=message):
            run_experiment(Experiment(data=str(data_file), **change), config, tmp_path)
    with pytest.raises(DataError, match="nowhere"):
        run_experiment(Experiment(data="nowhere"), config, tmp_path)


def test_arms_see_the_same_batches(
    experiment: Experiment, config: DCEConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, list[float]] = {}
    original = Trainer._step

    def spy(self: Trainer, snapshot: Any, images: Any, labels: Any) -> Any:
        seen.setdefault(id(self), []).append(float(images.sum()))
        keep.append(self)
        return original(self, snapshot, images, labels)

    keep: list[Trainer] = []
    monkeypatch.setattr(Trainer, "_step", spy)
    run_experiment(experiment, dataclasses.replace(config, epochs=1), tmp_path)
    sums = list(seen.values())
    assert len(sums) == 4
    assert sums[0] == sums[1] == sums[2] == sums[3]
    assert len(set(sums[0])) == len(sums[0])


def test_covering_steps_are_training_steps(config: DCEConfig, data_file: Path) -> None:
    groups = {"a": 10, "b": 6}
    assert CUCB(groups, config.density).covering_steps == 2
    assert load(data_file).num_classes == 4
