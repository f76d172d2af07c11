"""Rows: what groups whose channels form runs are chosen by."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dcx_kernels.selectors.layout import GroupLayout

__all__ = ["form_rows"]


def form_rows(scores: Tensor, layout: GroupLayout) -> tuple[Tensor, Tensor]:
    """Order the channels of every run; the j-th best of all runs of a group are its row j.

    Ties go to the lower index.

    Args:
        scores: (N,) floating, no NaN.
        layout: where the groups and their runs lie.

    Returns:
        the row of each channel, (N,) int64, and the mean score of each row, (R,), which does not
        rise within a group; +inf for a row that has both infinities.
    """
    best_first = torch.sort(scores, descending=True, stable=True).indices
    run = layout.run_of.index_select(0, best_first)
    # run after run, best first in each: runs and their places are where they were in the layout
    by_run = best_first.index_select(0, torch.sort(run, stable=True).indices)
    row_of = torch.empty_like(by_run).scatter_(0, by_run, layout.row_of_place)
    sums = scores.new_zeros(layout.rows.num_channels)
    # adds in the order of the runs for every row, so that rounding keeps the order of the rows
    sums.index_add_(0, layout.row_of_place, scores.index_select(0, by_run))
    means = sums / layout.runs_of_row
    return row_of, means.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
