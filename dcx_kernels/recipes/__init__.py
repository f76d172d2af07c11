"""Each paper's procedure, over the training loop."""

from __future__ import annotations

from dcx_kernels.recipes.config import DCEConfig
from dcx_kernels.recipes.dce import Loaders, Stage, finetune, train_plain, train_selected
from dcx_kernels.recipes.experiment import Experiment, Outcome, run_experiment
from dcx_kernels.recipes.run import Run

__all__ = [
    "DCEConfig",
    "Experiment",
    "Loaders",
    "Outcome",
    "Run",
    "Stage",
    "finetune",
    "run_experiment",
    "train_plain",
    "train_selected",
]
