"""A run on disk: where checkpoints and log are, and how a stage continues from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dcx_kernels.selectors import Selector
from dcx_kernels.train.checkpoint import load
from dcx_kernels.train.lock import Lock, hold
from dcx_kernels.train.log import Log
from dcx_kernels.train.loop import CHECKPOINT, Trainer
from dcx_kernels.train.progress import Progress, Silent
from dcx_kernels.train.schedule import Schedule, step_decay

__all__ = ["Run"]


@dataclass(frozen=True)
class Run:
    """The directory of a run.

    Args:
        directory: holds ``log.jsonl`` and ``checkpoints/ARM/latest.safetensors``.
        identity: JSON values that a checkpoint must agree with.
        resume: continue from checkpoints where there are some.
        checkpoint_every: steps between checkpoints, beside the one after each epoch.
        progress: what the user sees meanwhile.
    """

    directory: Path
    identity: dict[str, Any] = field(default_factory=dict)
    resume: bool = False
    checkpoint_every: int | None = None
    progress: Progress = field(default_factory=Silent)
    _locks: list[Lock | None] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def log_path(self) -> Path:
        """The log that all arms write into."""
        return self.directory / "log.jsonl"

    def checkpoint_dir(self, arm: str) -> Path:
        """Return where the checkpoints of ``arm`` go."""
        return self.directory / "checkpoints" / arm

    def saved_selector(self, arm: str) -> str | None:
        """Return the class name of the selector in the arm's checkpoint; None if there is none."""
        path = self.checkpoint_dir(arm) / CHECKPOINT
        if not self.resume or not path.exists():
            return None
        selector = load(path).get("selector")
        return None if selector is None else str(selector["kind"])

    def trainer(
        self,
        arm: str,
        model: nn.Module,
        selector: Selector | None,
        optimizer: Optimizer,
        schedule: Schedule = step_decay,
        **identity: Any,
    ) -> Trainer:
        """Return the trainer of ``arm``, at its checkpoint if the run is resumed.

        Args:
            arm: name in log, checkpoints and tables.
            model: the model to train.
            selector: its selector, or None.
            optimizer: its optimizer.
            schedule: factor on its learning rate.
            **identity: more JSON values that a checkpoint must agree with.

        Raises:
            CheckpointError: if the checkpoint is damaged or of another run, or another process is
                training in the directory.
        """
        if not self._locks:
            self._locks.append(hold(self.directory))
        log = Log(self.log_path, arm)
        trainer = Trainer(
            model,
            selector,
            optimizer,
            schedule=schedule,
            checkpoint_dir=self.checkpoint_dir(arm),
            checkpoint_every=self.checkpoint_every,
            log=log,
            progress=self.progress,
            config={**self.identity, "arm": arm, **identity},
        )
        self.progress.arm(arm)
        path = self.checkpoint_dir(arm) / CHECKPOINT
        if self.resume and path.exists():
            trainer.load(path)
        else:
            log.truncate(0)
        return trainer
