"""Each paper's procedure, over the training loop."""

from __future__ import annotations

from dcx_kernels.recipes.config import DCEConfig, DCPConfig, TrainConfig
from dcx_kernels.recipes.experiment import Experiment, Outcome, run_experiment
from dcx_kernels.recipes.fbs import FBSConfig, FBSPoint, train_fbs
from dcx_kernels.recipes.methods import train_selected
from dcx_kernels.recipes.run import Run
from dcx_kernels.recipes.slimming import SlimmingConfig, slim, train_slimming
from dcx_kernels.recipes.stages import Loaders, Stage, cut_out, train_plain

__all__ = [
    "DCEConfig",
    "DCPConfig",
    "Experiment",
    "FBSConfig",
    "FBSPoint",
    "Loaders",
    "Outcome",
    "Run",
    "SlimmingConfig",
    "Stage",
    "TrainConfig",
    "cut_out",
    "run_experiment",
    "slim",
    "train_fbs",
    "train_plain",
    "train_selected",
    "train_slimming",
]
