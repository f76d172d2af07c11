"""The thin trainer: one loop, complete checkpoints, an exact log."""

from __future__ import annotations

from dcx_kernels.train.evaluate import Evaluation, evaluate
from dcx_kernels.train.log import Log, read_rows
from dcx_kernels.train.loop import Trainer
from dcx_kernels.train.memory import saved_bytes
from dcx_kernels.train.recalibrate import recalibrate
from dcx_kernels.train.schedule import Schedule, constant, multi_step, step_decay

__all__ = [
    "Evaluation",
    "Log",
    "Schedule",
    "Trainer",
    "constant",
    "evaluate",
    "multi_step",
    "read_rows",
    "recalibrate",
    "saved_bytes",
    "step_decay",
]
