"""The targets of feature boosting and suppression, trained in tiny."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dcx_kernels.data import load
from dcx_kernels.graph import convert_fbs, count_winners
from dcx_kernels.models import build
from dcx_kernels.recipes import reproduce_gating
from dcx_kernels.recipes.reproduce import reproduce
from dcx_kernels.recipes.reproduce_figures import figures
from dcx_kernels.recipes.reproduce_scale import Options, settings_for
from dcx_kernels.recipes.reproduce_table import cells_of, table_csv
from dcx_kernels.recipes.reproduce_target import load_target
from dcx_kernels.recipes.stages import make_loaders
from dcx_kernels.train.progress import Silent


class _Epochs(Silent):
    """Notes which epochs of which arms are trained."""

    def __init__(self) -> None:
        self.seen, self.now = list[tuple[str, int]](), ""

    def arm(self, name: str) -> None:
        self.now = name

    def show(self, position: Any, row: Mapping[str, Any]) -> None:
        if row["kind"] == "epoch":
            self.seen.append((self.now, row["epoch"]))


@pytest.fixture
def options(data_file: Path) -> Options:
    return Options({"cifar10": str(data_file)}, epochs=1, batch_size=16, lr=0.05, width=1 / 8)


def test_epochs_of_a_part_keep_their_share() -> None:
    target = load_target("fbs-figure3")
    ns = next(e for e in target.entries if e.variant == "ns")
    for epochs, shares in ((300, (100, 150)), (30, (10, 15)), (4, (2, 2)), (1, (1, 1))):
        settings = settings_for(target, ns, Options({"cifar10": "x"}, epochs=epochs))
        assert settings["epochs"] == epochs
        assert (settings["decay_every"], settings["sparse_epochs"]) == shares


def test_densities_share_one_chain(options: Options, tmp_path: Path) -> None:
    target = load_target("fbs-figure3").narrowed([0.9, 0.7, 0.5], variants=["baseline", "fbs"])
    epochs = _Epochs()
    found = reproduce(target, options, tmp_path, progress=epochs)
    arms = ["dense", "fbs-1", "fbs-0.9", "fbs-0.8", "fbs-0.7", "fbs-0.6", "fbs-0.5"]
    assert epochs.seen == [(arm, 0) for arm in arms]  # each once
    assert len(list((tmp_path / "runs").iterdir())) == 2
    rows = [found.rows[entry][0] for entry in target.entries]
    assert [row["density"] for row in rows] == [1.0, 0.9, 0.7, 0.5]
    macs = [row["macs"] for row in rows]
    assert macs == sorted(macs, reverse=True)
    # ceil(0.5 C) winners at most, of 8 8 16 16 16 24 24 24 channels
    for made, channels in zip(
        rows[3]["widths"].values(), (8, 8, 16, 16, 16, 24, 24, 24), strict=True
    ):
        assert 0 < made <= channels / 2
    assert rows[3]["params"] <= rows[1]["params"]
    # at half of the channels, both sides: near a quarter; more saved where gates are zero
    saving = cells_of(found, target.entries[3])["saving"]
    assert saving.paper == 3.93
    assert saving.mean is not None and saving.mean > 3
    drawn = figures(found)
    assert set(drawn) == {"figure.png", "skipping.png"}
    skipping = np.array(next(iter(rows[3]["skipping"].values())))
    assert skipping.shape == (4, 8)  # classes, channels
    # every class has six test images: the mean is that of all of them
    first = next(iter(rows[3]["widths"].values()))
    assert skipping.mean() == pytest.approx(1 - first / 8, abs=1e-3)
    assert "skipping" not in rows[1]


def test_skipping_is_what_is_not_chosen(data_file: Path) -> None:
    data = load(str(data_file))
    loaders = make_loaders(data, 16, False, 0, torch.device("cpu"))
    model = convert_fbs(build("m_cifarnet", 4, width=1 / 8), torch.zeros(1, 3, 32, 32))
    model.set_density(0.25)
    found = reproduce_gating._skipping(SimpleNamespace(data=data), model, loaders)
    images = [images for images, _ in loaders.test.batches(0)]
    for name, counts in count_winners(model, images).items():
        skipped = 1 - counts.double() / sum(len(batch) for batch in images)
        assert skipped.mean() >= 0.75
        # six test images of each class
        assert np.array(found[name]).mean(0) == pytest.approx(skipped.numpy(), abs=1e-4)


def test_chain_goes_on_where_it_stopped(options: Options, tmp_path: Path) -> None:
    target = load_target("fbs-table4").narrowed([0.5], variants=["fbs"])

    class _Stop(_Epochs):
        def show(self, position: Any, row: Mapping[str, Any]) -> None:
            super().show(position, row)
            if self.now == "fbs-0.7" and row["kind"] == "step":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce(target, options, tmp_path / "stopped", progress=_Stop())
    epochs = _Epochs()
    again = reproduce(target, options, tmp_path / "stopped", progress=epochs)
    assert epochs.seen == [("fbs-0.7", 0), ("fbs-0.6", 0), ("fbs-0.5", 0)]
    whole = reproduce(target, options, tmp_path / "whole")
    assert table_csv(again) == table_csv(whole)


def test_slimming_and_both(options: Options, tmp_path: Path) -> None:
    target = load_target("fbs-table4").narrowed([0.9, 0.6], variants=["ns", "ns+fbs"])
    found = reproduce(target, options, tmp_path)
    ns, both = (found.rows[entry][0] for entry in target.entries)
    assert sum(ns["widths"].values()) == 136 - 13  # a tenth of the channels is gone
    assert ns["macs"] < ns["dense_macs"] == both["dense_macs"]
    assert both["macs"] < ns["macs"]
    assert both["params"] <= ns["params"] + 136 * 24  # gates are added
    names = {path.name.partition("-seed")[0] for path in (tmp_path / "runs").iterdir()}
    start = "cifar10-m_cifarnet-"
    assert names == {start + part for part in ("dense", "ns-0.9", "ns-fbs")}


@pytest.mark.slow
def test_memory_of_resnet18(data_file: Path, tmp_path: Path) -> None:
    options = Options({"imagenet": str(data_file)}, epochs=1, batch_size=16, lr=0.01, image_size=32)
    target = load_target("fbs-table3").narrowed([0.6, 1.0], models=["resnet18"])
    found = reproduce(target, options, tmp_path)
    before, fbs = (cells_of(found, entry) for entry in target.entries)
    assert before["weight_mb"].paper == 44.6
    # 11.17 M weights of convolutions, 4 bytes: the paper counts 44.6 MB
    assert before["weight_mb"].mean == pytest.approx(44.6, rel=0.01)
    assert before["saving"].mean == 1
    for name in ("weight_mb", "activation_mb", "peak_mb", "peak_128_gb"):
        assert fbs[name].mean < before[name].mean
    assert set(figures(found)) == {"figure.png"}
