"""The rows of the log: what they say about each group."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.data import Loader
from dcx_kernels.selectors import CUCB, DCP, Random, Selector
from dcx_kernels.train.log import read_rows
from dcx_kernels.train.loop import Trainer
from dcx_kernels.train.position import Position
from dcx_kernels.train.rows import epoch_row, step_row


def test_epoch_row_has_widths_totals_and_mean_scores() -> None:
    sets = {"a": ChannelSet([0, 2], 4), "b": ChannelSet([1], 3)}
    scores = {"a": torch.tensor([0.5, 0.0, 1.0, 0.5]), "b": torch.tensor([3.0, 0.0, 0.0])}
    row = epoch_row(Position(), 0.1, sets, None, 2.0, scores)
    assert row["widths"] == {"a": 2, "b": 1} and row["channels"] == {"a": 4, "b": 3}
    assert row["scores"] == {"a": 0.5, "b": 1.0}
    json.dumps(row)
    assert not {"scores", "widths", "channels"} & set(epoch_row(Position(), 0.1, None, None, 2.0))
    step = step_row(Position(step=400), 1.0, 2.0, sets, 400)
    assert step["widths"] == {"a": 2, "b": 1} and step["channels"] == {"a": 4, "b": 3}


@pytest.mark.parametrize("policy", [CUCB, DCP, Random])
def test_the_loop_logs_what_the_selector_ranks_by(
    policy: Callable[..., Selector],
    tmp_path: Path,
    trainer_in: Callable[..., Trainer],
    channel_model: Callable[..., Any],
    loader: Loader,
) -> None:
    model = channel_model()
    selector = policy(model.groups, density=0.5)
    trainer_in(tmp_path, model=model, selector=selector).fit(loader, 2)
    rows = [row for row in read_rows(tmp_path / "log.jsonl") if row["kind"] == "epoch"]
    if isinstance(selector, CUCB | DCP):
        last = selector.mean if isinstance(selector, CUCB) else selector.utility
        assert rows[-1]["scores"] == {name: float(v.mean()) for name, v in last.items()}
        assert rows[0]["scores"] != rows[1]["scores"]
    else:
        assert not any("scores" in row for row in rows)
