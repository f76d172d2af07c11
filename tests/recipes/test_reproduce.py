"""Reproducing a table: every training once, within the budget, resumed where it stopped."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dcx_kernels.errors import NonFiniteError
from dcx_kernels.recipes import reproduce_recipes
from dcx_kernels.recipes.reproduce import Reproduction, reproduce
from dcx_kernels.recipes.reproduce_figures import figures
from dcx_kernels.recipes.reproduce_scale import Options
from dcx_kernels.recipes.reproduce_table import cells_of, runs_csv, table_csv, title_of
from dcx_kernels.recipes.reproduce_target import Entry, Target, load_target
from dcx_kernels.recipes.reproduce_work import Work, short_name
from dcx_kernels.train.log import read_rows
from dcx_kernels.train.progress import Silent

TIMES = ("wall_s", "finished", "step_ms", "train_s", "curve")
SCALE = {"epochs": 2, "batch_size": 16, "lr": 0.05, "width": 1 / 16}


@pytest.fixture
def options(data_file: Path) -> Options:
    return Options({"cifar10": str(data_file)}, **SCALE)


def _rows(directory: Path) -> list[dict[str, Any]]:
    rows = read_rows(directory / "results.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def _figure3(*variants: str, seeds: tuple[int, ...] = (0,)) -> Target:
    return load_target("dce-figure3").narrowed([0.5], ["vgg19"], variants or None, seeds)


class _Faked:
    """Stands for the recipes: the accuracy depends on line and seed, and a clock is moved on."""

    def __init__(self) -> None:
        self.seconds, self.done = 0.0, list[tuple[str, float, int]]()
        self.fail: set[tuple[str, int]] = set()

    def __call__(self, work: Work) -> Mapping[str, Any]:
        entry = work.entry
        if (entry.variant, work.seed) in self.fail:
            raise NonFiniteError("step 3 (epoch 1): the loss is nan")
        self.done.append((entry.variant, entry.density, work.seed))
        self.seconds += 100
        gain = 0.01 if entry.variant == "single-stage" else 0.0
        accuracy = 0.5 + gain * (1 + work.seed) + 0.1 * work.seed + (entry.density - 0.3)
        return {"accuracy": accuracy, "params": 9e6, "macs": 1e8, "dense_macs": 4e8}

    def clock(self) -> float:
        return self.seconds


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> _Faked:
    fake = _Faked()
    for name in reproduce_recipes.RECIPES:
        monkeypatch.setitem(reproduce_recipes.RECIPES, name, fake)
    return fake


# with recipes that only pretend


def test_budget_stops_between_trainings_and_says_what_is_missing(
    faked: _Faked, options: Options, tmp_path: Path
) -> None:
    target = load_target("dce-table2").narrowed([0.2, 0.3], seeds=(0, 1))
    limited = Options(options.sources, **SCALE, budget_s=450)
    found = reproduce(target, limited, tmp_path, clock=faked.clock)
    # seed by seed: four at 0, 100, 200, 300, one more at 400, none at 500
    first = [(v, d, 0) for d in (0.2, 0.3) for v in ("two-stage", "single-stage")]
    assert faked.done == [*first, ("two-stage", 0.2, 1)]
    line = Entry("cifar10", "vgg19", "two-stage", 0.3)
    assert found.missing[line, 1] == "the budget is spent"
    assert len(found.missing) == 3
    assert [row["seed"] for row in found.rows[line]] == [0]
    faked.done.clear()
    again = reproduce(target, options, tmp_path, clock=faked.clock)
    assert len(faked.done) == 3
    assert again.missing == {}
    assert [len(rows) for rows in again.rows.values()] == [2] * 4


def test_finished_trainings_are_found_by_what_they_are(
    faked: _Faked, options: Options, tmp_path: Path
) -> None:
    target = load_target("dce-table2").narrowed([0.4], seeds=(0,))
    reproduce(target, options, tmp_path)
    assert len(faked.done) == 2
    # the same two-stage training is a line of the figure, too
    figure = load_target("dce-figure3").narrowed([0.4], ["vgg19"], ["two-stage", "random"], (0,))
    found = reproduce(figure, options, tmp_path)
    assert [variant for variant, _, _ in faked.done] == ["two-stage", "single-stage", "random"]
    assert found.rows[figure.entries[0]][0]["target"] == "dce-table2"
    other = Options(options.sources, **{**SCALE, "epochs": 3})
    reproduce(target, other, tmp_path)
    assert len(faked.done) == 5


def test_table_is_mean_and_deviation_over_seeds(
    faked: _Faked, options: Options, tmp_path: Path
) -> None:
    target = load_target("dce-table2").narrowed([0.2, 0.3])
    found = reproduce(target, options, tmp_path)
    two, single = (cells_of(found, entry) for entry in target.entries[2:])
    # 50, 60, 70 %; then 51, 62, 73 %
    assert (two["accuracy"].mean, two["accuracy"].deviation) == pytest.approx((60, 10))
    assert (single["accuracy"].mean, single["accuracy"].deviation) == pytest.approx((62, 11))
    assert single["accuracy"].paper == 90.98
    # 1, 2, 3 points: of the same seed, so that seeds that are all better do not hide it
    assert (single["change"].mean, single["change"].deviation) == pytest.approx((2, 1))
    assert single["change"].paper == -0.36
    assert two["change"].mean is None
    assert (single["params"].mean, single["params"].deviation) == (9, 0)
    line = list(csv.DictReader(io.StringIO(table_csv(found))))[2]
    assert line["seeds"] == "0 1 2"
    assert float(line["accuracy % (deviation)"]) == pytest.approx(10)
    assert line["scaled"].startswith("epochs 2 (paper 160); batch size 16 (paper 64); lr 0.05")


def test_rows_say_how_they_were_made(faked: _Faked, options: Options, tmp_path: Path) -> None:
    found = reproduce(load_target("dce-table2").narrowed([0.3], seeds=(7,)), options, tmp_path)
    row = _rows(tmp_path)[0]
    assert row["config"] == "dce-table2.json"
    assert row["seed"] == 7
    assert row["settings"]["epochs"] == 2
    assert row["settings"]["procedure"] == "two-stage"
    assert row["source"] == "tiny.npz"  # no path of this machine
    assert row["machine"] and row["device"] and row["torch"]
    assert "commit" in row
    assert row["scaled"][0] == "epochs 2 (paper 160)"
    lines = list(csv.DictReader(io.StringIO(runs_csv(found))))
    assert [line["variant"] for line in lines] == ["two-stage", "single-stage"]
    assert float(lines[0]["wall_s"]) >= 0
    assert "64 images of 4 classes for cifar10" in title_of(found)
    assert "SCALED DOWN: epochs 2 (paper 160)" in title_of(found)


def test_a_training_that_fails_does_not_stop_the_others(
    faked: _Faked, options: Options, tmp_path: Path
) -> None:
    faked.fail = {("two-stage", 0)}
    target = load_target("dce-table2").narrowed([0.3], seeds=(0, 1))
    found = reproduce(target, options, tmp_path)
    assert found.failed
    assert list(found.missing.values()) == ["step 3 (epoch 1): the loss is nan"]
    assert len(faked.done) == 3
    change = cells_of(found, target.entries[1])["change"]
    assert change.count == 1  # seed 0 has nothing to be compared with


def test_wall_time_counts_what_was_interrupted(
    faked: _Faked, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = load_target("dce-table2").narrowed([0.3], variants=["single-stage"], seeds=(0,))

    def stopped(work: Work) -> Mapping[str, Any]:
        time.sleep(0.2)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(reproduce_recipes.RECIPES, "dce", stopped)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                reproduce(target, options, tmp_path)
    reproduce(target, options, tmp_path)
    (row,) = read_rows(tmp_path / "results.jsonl")
    assert row["wall_s"] >= 0.4
    assert [path.name for path in (tmp_path / "runs").iterdir()] == []


def test_data_that_is_not_given_is_missing(faked: _Faked, options: Options, tmp_path: Path) -> None:
    found = reproduce(
        load_target("dce-table1").narrowed([0.4], ["vgg19"], seeds=(0,)), options, tmp_path
    )
    assert {entry.data for entry, _ in found.missing} == {"cifar100", "svhn"}
    assert set(found.missing.values()) == {
        "no data, give --data cifar100=SOURCE",
        "no data, give --data svhn=SOURCE",
    }
    assert {entry.data for entry in found.rows} == {"cifar10"}


@pytest.mark.parametrize("name", ["dce-figure3", "dcp-table1", "dcp-table4", "dcp-figures"])
def test_figures_are_drawn(faked: _Faked, options: Options, tmp_path: Path, name: str) -> None:
    target = load_target(name)
    target = target.narrowed(models=target.values("model")[:1], seeds=(0, 1))
    assert figures(Reproduction(target, [], options.sources)) == {}
    drawn = figures(reproduce(target, options, tmp_path))
    assert set(drawn) == {"figure.png"}
    assert drawn["figure.png"].startswith(b"\x89PNG")


def test_short_names_of_sources() -> None:
    assert short_name("digits") == "digits"
    assert short_name("/a/b/cifar.npz") == "cifar.npz"
    assert short_name("svhn:/a/svhn/") == "svhn:svhn"


# in earnest


class _Stop(Silent):
    """Interrupts in an epoch of an arm, as a kill would: nothing is saved on the way out."""

    def __init__(self, arm: str, epoch: int) -> None:
        self.wanted, self.now = (arm, epoch), ""

    def arm(self, name: str) -> None:
        self.now = name

    def show(self, position: Any, row: Mapping[str, Any]) -> None:
        if row["kind"] == "step" and (self.now, position.epoch) == self.wanted:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reproduction]:
    """Selected and random final channels, without an interruption."""
    directory = tmp_path_factory.mktemp("whole")
    options = Options({"cifar10": str(data_file)}, **SCALE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = reproduce(_figure3("two-stage", "random-final"), options, directory)
    torch.set_num_threads(threads)
    return directory, found


@pytest.mark.parametrize("arm", ["sparse", "thin-random"])
def test_resume_gives_the_same_table(
    options: Options, whole: tuple[Path, Reproduction], tmp_path: Path, arm: str
) -> None:
    target = _figure3("two-stage", "random-final")
    directory = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        reproduce(target, options, directory, progress=_Stop(arm, 1))
    epochs = []

    class _Watch(Silent):
        name = ""

        def arm(self, name: str) -> None:
            self.name = name

        def show(self, position: Any, row: Mapping[str, Any]) -> None:
            if row["kind"] == "epoch":
                epochs.append((self.name, row["epoch"]))

    found = reproduce(target, options, directory, progress=_Watch())
    # from the checkpoint of the first epoch; what was done before is not done again
    expected = [("sparse", 1), ("thin", 0), ("thin", 1), ("thin-random", 0), ("thin-random", 1)]
    assert epochs == (expected if arm == "sparse" else expected[-1:])
    assert table_csv(found) == table_csv(whole[1])
    assert _rows(directory) == _rows(whole[0])
    assert not list(directory.rglob("*elapsed*"))
    assert json.loads((directory / "results.jsonl").read_text().splitlines()[0])["wall_s"] > 0


def test_random_final_shares_the_selection_and_changes_the_channels(
    whole: tuple[Path, Reproduction],
) -> None:
    directory, found = whole
    chosen, drawn = _rows(directory)
    assert (chosen["variant"], drawn["variant"]) == ("two-stage", "random-final")
    # half of 344 channels, whoever chose them
    assert sum(chosen["widths"].values()) == sum(drawn["widths"].values()) == 172
    assert chosen["widths"] != drawn["widths"]
    (run,) = (directory / "runs").iterdir()
    arms = {path.name for path in (run / "checkpoints").iterdir()}
    assert arms == {"sparse", "thin", "thin-random"}
    change = cells_of(found, found.target.entries[1])["change"]
    expected = 100 * (drawn["accuracy"] - chosen["accuracy"])
    assert change.mean == pytest.approx(expected)


def test_random_throughout_is_another_training(options: Options, tmp_path: Path) -> None:
    one_epoch = Options(options.sources, **{**SCALE, "epochs": 1})
    found = reproduce(_figure3("random"), one_epoch, tmp_path)
    assert [row["settings"]["selector"] for row in _rows(tmp_path)] == ["random"]
    (run,) = (tmp_path / "runs").iterdir()
    steps = [row for row in read_rows(run / "log.jsonl") if row["kind"] == "step"]
    widths = [json.dumps(row["widths"]) for row in steps if row["arm"] == "sparse"]
    assert len(set(widths)) == len(widths) == 4  # other channels at every step
    assert sum(found.rows[found.target.entries[0]][0]["widths"].values()) == 172
