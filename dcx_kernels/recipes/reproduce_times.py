"""What a training took, and how accurate it was after how long, from the log of its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from dcx_kernels.recipes.run import Run
from dcx_kernels.train.log import read_rows

__all__ = ["seconds_to", "times"]


def times(run: Run, arms: Sequence[str]) -> dict[str, Any]:
    """Return steps, their median and sum, and accuracy over time, of arms one after the other.

    Time is that of training steps alone: selection, forward, backward, update. Reading images and
    evaluating, which all trainings have alike, do not count; nor does a time in which the training
    was interrupted.

    Args:
        run: its directory holds the log.
        arms: stages of one training, in their order; a stage that took no step has no rows.

    Returns:
        ``steps``; ``step_ms``, their median; ``train_s``, their sum; ``curve``: a list of seconds
        so far and accuracy of the test images (a fraction), for the end of each epoch.
    """
    logged = read_rows(run.log_path)
    steps: list[float] = []
    curve = []
    for arm in arms:
        for row in logged:
            if row["arm"] != arm:
                continue
            if row["kind"] == "step":
                steps.append(row["step_ms"])
            elif "test_accuracy" in row:
                curve.append([round(sum(steps) / 1e3, 3), row["test_accuracy"]])
    return {
        "steps": len(steps),
        "step_ms": round(median(steps), 3) if steps else None,
        "train_s": round(sum(steps) / 1e3, 3),
        "curve": curve,
    }


def seconds_to(row: Mapping[str, Any], accuracy: float | None) -> float | None:
    """Return the seconds after which a training was that accurate, at the end of an epoch.

    Args:
        row: what `times` found.
        accuracy: a fraction.

    Returns:
        None if it never was.
    """
    if accuracy is None:
        return None
    reached = (seconds for seconds, found in row.get("curve", ()) if found >= accuracy)
    return next(reached, None)
