"""The baseline of section 3.4: selected while training, random in the end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dcx_kernels.recipes import DCEConfig, Experiment, run_experiment
from dcx_kernels.selectors import Random
from dcx_kernels.train.log import read_rows


@pytest.fixture
def alone(experiment: Experiment) -> Experiment:
    return dataclasses.replace(experiment, compare=())


def _steps(directory: Path) -> list[dict[str, Any]]:
    rows = read_rows(directory / "log.jsonl")
    return [row for row in rows if row["arm"] == "sparse" and row["kind"] == "step"]


def _drawn(result: dict[str, Any], config: DCEConfig) -> dict[str, int]:
    sets = Random(result["channels"], config.density, seed=config.seed).final()
    return {name: len(chosen) for name, chosen in sets.items()}


def test_two_stage_trains_the_same_and_keeps_others(
    alone: Experiment, config: DCEConfig, tmp_path: Path
) -> None:
    drawing = dataclasses.replace(config, final="random")
    best = run_experiment(alone, config, tmp_path / "best").result
    drawn = run_experiment(alone, drawing, tmp_path / "drawn").result
    steps = [_steps(tmp_path / name) for name in ("best", "drawn")]
    assert len(steps[0]) == 8
    for a, b in zip(*steps, strict=True):
        assert (a["loss"], a["widths"]) == (b["loss"], b["widths"])
    assert drawn["final"] == _drawn(drawn, drawing) != best["final"]
    assert sum(drawn["final"].values()) == sum(best["final"].values()) == 172


def test_single_stage_freezes_random_channels_and_resumes(
    alone: Experiment, config: DCEConfig, tmp_path: Path
) -> None:
    changes = {"procedure": "single-stage", "epochs": 3, "select_epochs": 1, "final": "random"}
    config = dataclasses.replace(config, **changes)
    result = run_experiment(alone, config, tmp_path).result
    frozen = [json.dumps(row["widths"]) for row in _steps(tmp_path) if row["step"] > 4]
    assert set(frozen) == {json.dumps(_drawn(result, config))}
    before = (tmp_path / "thin.safetensors").read_bytes()
    again = run_experiment(alone, config, tmp_path, resume=True).result
    assert again["final"] == result["final"] == _drawn(result, config)
    assert (tmp_path / "thin.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"final": "worst"}, r"expected final to be one of \('best', 'random'\), got worst"),
        ({"final": "random", "selector": "static"}, "final='best' with the selector static"),
    ],
)
def test_wrong_finals_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DCEConfig(**changes)
