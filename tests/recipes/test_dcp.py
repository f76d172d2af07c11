"""Dynamic channel propagation, end to end on tiny networks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from dcx_kernels.data import eval_loader, load, train_loader
from dcx_kernels.graph import compact, convert, load_compact
from dcx_kernels.models import build
from dcx_kernels.recipes import DCPConfig, Experiment, Loaders, Run, dcp, run_experiment
from dcx_kernels.recipes.networks import build_network
from dcx_kernels.selectors import DCP, Random, Static
from dcx_kernels.train import checkpoint
from dcx_kernels.train.log import TIMINGS, read_rows
from dcx_kernels.train.loop import Trainer


@pytest.fixture
def experiment(data_file: Path) -> Experiment:
    return Experiment(data=str(data_file), model="vgg16", width=1 / 16)


@pytest.fixture
def config() -> DCPConfig:
    return DCPConfig(density=0.5, epochs=3, warmup_epochs=1, batch_size=16, lr=0.05)


def _rows(directory: Path) -> list[dict[str, Any]]:
    rows = read_rows(directory / "log.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def _files(directory: Path) -> dict[str, bytes]:
    paths = sorted(directory.rglob("*.safetensors"))
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def _numbers(directory: Path) -> list[dict[str, Any]]:
    arms = json.loads((directory / "result.json").read_text())["arms"]
    return [{k: v for k, v in arm.items() if not k.endswith("step_ms")} for arm in arms]


# which layers


def _pruned(name: str, **changes: Any) -> dict[str, int]:
    network = build_network(name, 10)
    groups = convert(network, torch.zeros(1, 3, 32, 32), changes.get("residual", "keep")).groups
    return dcp.make_selector(groups, DCPConfig(**changes), 10).groups


def test_vgg16_is_pruned_in_all_convolutions() -> None:
    assert list(_pruned("vgg16").values()) == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6


def test_resnet32_is_pruned_in_the_first_convolution_of_each_block() -> None:
    assert _pruned("resnet32") == {
        f"layer{stage + 1}.{block}.conv1": 16 * 2**stage for stage in range(3) for block in range(5)
    }


def test_resnet50_is_pruned_in_the_first_two_convolutions_of_each_bottleneck() -> None:
    assert _pruned("resnet50") == {
        f"layer{stage + 1}.{block}.conv{conv}": 64 * 2**stage
        for stage, blocks in enumerate((3, 4, 6, 3))
        for block in range(blocks)
        for conv in (1, 2)
    }


def test_another_residual_policy_prunes_what_it_can() -> None:
    assert "conv1" in _pruned("resnet50", residual="union")
    assert "conv1" not in _pruned("resnet50")


# the selector


def test_selector_counts_epochs_in_steps() -> None:
    groups = convert(build("vgg16", 4, width=1 / 16), torch.zeros(1, 3, 32, 32)).groups
    options = {"strict": True, "decay_scope": "all", "initial": "inverse", "min_active": 2}
    config = DCPConfig(density=0.5, epochs=9, warmup_epochs=2, **options)  # type: ignore[arg-type]
    selector = dcp.make_selector(groups, config, steps_per_epoch=7)
    assert isinstance(selector, DCP)
    assert selector.decay == {0: 0.6, 21: 0.7, 42: 1.0}
    assert selector.warmup_steps == 14
    assert {name: getattr(selector, name) for name in options} == options
    assert (selector.budget, selector.round_to) == (132, 1)


@pytest.mark.parametrize(
    ("network", "given", "initial"),
    [
        ("vgg16", None, "zero"),
        ("resnet32", None, "inverse"),
        ("resnet32", "zero", "zero"),
        ("vgg16", "inverse", "inverse"),
    ],
)
def test_utilities_begin_as_in_the_papers_code(
    network: str, given: Literal["zero", "inverse"] | None, initial: str
) -> None:
    width = 1 / 16 if network == "vgg16" else 0.25
    groups = convert(build(network, 4, width=width), torch.zeros(1, 3, 32, 32)).groups
    selector = dcp.make_selector(groups, DCPConfig(initial=given), 7)
    assert isinstance(selector, DCP)
    assert selector.initial == initial


@pytest.mark.parametrize(("name", "kind"), [("random", Random), ("static", Static)])
def test_other_selectors(name: str, kind: type) -> None:
    groups = convert(build("vgg16", 4, width=1 / 16), torch.zeros(1, 3, 32, 32)).groups
    selector = dcp.make_selector(groups, DCPConfig(density=0.5, selector=name), 7)
    assert type(selector) is kind
    assert sum(map(len, selector.select().values())) == 132


# the procedure


def test_training_warms_up_selects_and_is_cut_out(
    experiment: Experiment, config: DCPConfig, tmp_path: Path
) -> None:
    experiment = dataclasses.replace(experiment, compare=("mask", "dense"))
    outcome = run_experiment(experiment, config, tmp_path)
    arms = {arm["arm"]: arm for arm in outcome.result["arms"]}
    assert {name: arm["steps"] for name, arm in arms.items()} == {
        "dense": 12,
        "mask": 12,
        "sparse": 12,
        "thin": 0,  # nothing is fine-tuned
    }
    assert arms["thin"]["accuracy"] == arms["sparse"]["accuracy"]
    assert arms["thin"]["params"] == arms["sparse"]["params"] < arms["dense"]["params"]
    assert arms["sparse"]["accuracy_as_trained"] is None  # not recalibrated
    assert arms["sparse"]["selecting_saved_bytes"] < 0.75 * arms["mask"]["selecting_saved_bytes"]
    assert outcome.result["method"] == "dcp"
    assert sum(outcome.result["final"].values()) == 132
    steps = [row for row in _rows(tmp_path) if row["kind"] == "step" and row["arm"] == "sparse"]
    assert [row["active"] for row in steps] == [264] * 4 + [132] * 8
    for arm in ("sparse", "dense"):  # thirds of three epochs
        rows = [row for row in _rows(tmp_path) if row["kind"] == "epoch" and row["arm"] == arm]
        assert [row["lr"] for row in rows] == pytest.approx([0.05, 0.005, 0.0005])
    saved = checkpoint.load(tmp_path / "checkpoints" / "sparse" / "latest.safetensors")
    assert saved["selector"]["kind"] == "DCP"
    assert json.loads(saved["selector"]["state"]["decay"]) == [[0, 0.6], [4, 0.7], [8, 1.0]]
    assert not saved["optimizer"]["state"]["param_groups"][0]["nesterov"]
    # the utilities of every group are in the log
    epochs = [row for row in _rows(tmp_path) if row["kind"] == "epoch" and row["arm"] == "sparse"]
    assert all(set(row["scores"]) == set(outcome.result["channels"]) for row in epochs)
    assert all(min(row["scores"].values()) > 0 for row in epochs)


def test_sparse_equals_mask_step_by_step(
    experiment: Experiment, config: DCPConfig, tmp_path: Path
) -> None:
    run_experiment(dataclasses.replace(experiment, compare=("mask",)), config, tmp_path)
    sparse, mask = (
        [row for row in _rows(tmp_path) if row["arm"] == arm and row["kind"] == "step"]
        for arm in ("sparse", "mask")
    )
    for a, b in zip(sparse[:5], mask[:5], strict=True):  # later float32 drifts apart
        assert a["widths"] == b["widths"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


@pytest.mark.parametrize(("model", "width"), [("vgg16", 1 / 16), ("resnet20", 0.25)])
def test_direct_export_computes_what_the_masked_network_does(
    data_file: Path, config: DCPConfig, tmp_path: Path, model: str, width: float
) -> None:
    data = load(data_file)
    train = train_loader(data, 16, seed=0)
    loaders = Loaders(train, train, eval_loader(data, 24))
    example = torch.zeros(1, 3, 32, 32)
    torch.manual_seed(0)
    masked = convert(build(model, 4, width=width), example, execution="mask")
    stage = dcp.train_selected(masked, loaders, config, Run(tmp_path))
    assert stage.sets is not None
    assert sum(map(len, stage.sets.values())) < sum(s.num_channels for s in stage.sets.values())
    images = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    masked.double().eval()
    thin = compact(masked).eval()
    with torch.no_grad():
        torch.testing.assert_close(thin(images), masked(images), rtol=1e-9, atol=1e-12)
    full = {name: group for name, group in masked.groups.items() if group.selectable}
    assert {name: len(s) for name, s in masked.active.items()} == {
        name: len(stage.sets[name]) if name in stage.sets else group.num_channels
        for name, group in full.items()
    }


def test_thin_file_is_the_thin_network(
    experiment: Experiment, config: DCPConfig, tmp_path: Path
) -> None:
    experiment = dataclasses.replace(experiment, model="resnet20", width=0.5)
    outcome = run_experiment(experiment, dataclasses.replace(config, epochs=2), tmp_path)
    thin = load_compact(tmp_path / "thin.safetensors", build("resnet20", 4, width=0.5))
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(thin.eval()(images), outcome.thin.eval()(images))
    assert set(outcome.result["channels"]) == {
        f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)
    }


class _KilledError(Exception):
    """Stands for kill -9: nothing is saved on the way out."""


def test_resume_within_warm_up_and_selection_is_exact(
    experiment: Experiment, config: DCPConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, recalibrate=True, milestones=(2,))
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
    while True:
        budget["left"] = 3
        attempts += 1
        try:
            run_experiment(experiment, config, directory, resume=True, checkpoint_every=1)
            break
        except _KilledError:
            continue
    assert attempts == 4
    assert _rows(directory) == _rows(tmp_path / "straight")
    assert _files(directory) == _files(tmp_path / "straight")
    assert _numbers(directory) == _numbers(tmp_path / "straight")


def test_a_warm_up_throughout_still_ends_with_a_selection(
    experiment: Experiment, config: DCPConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, epochs=1, warmup_epochs=1)
    outcome = run_experiment(experiment, config, tmp_path)
    sparse = outcome.result["arms"][0]
    assert sparse["selecting_step_ms"] is sparse["selecting_saved_bytes"] is None
    assert sum(outcome.result["final"].values()) == 132
    assert [row["active"] for row in _rows(tmp_path) if row["kind"] == "step"] == [264] * 4
