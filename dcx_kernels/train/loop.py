"""The training loop: one story, in the order in which it happens.

References:
    Spasov and Lio, "Dynamic Neural Network Channel Execution for Efficient Training",
    Algorithm 1. https://arxiv.org/abs/1905.06435
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from dcx_kernels.data import Loader
from dcx_kernels.errors import NonFiniteError
from dcx_kernels.graph import ChannelModel
from dcx_kernels.selectors import Selector
from dcx_kernels.train import checkpoint, state
from dcx_kernels.train.evaluate import evaluate
from dcx_kernels.train.interrupt import Interrupt
from dcx_kernels.train.log import Log
from dcx_kernels.train.position import Position
from dcx_kernels.train.progress import Progress, Silent
from dcx_kernels.train.readback import Readback
from dcx_kernels.train.rows import epoch_row, step_row
from dcx_kernels.train.schedule import Schedule, step_decay
from dcx_kernels.train.snapshot import Snapshot

__all__ = ["CHECKPOINT", "Trainer"]

CHECKPOINT = "latest.safetensors"


class Trainer:
    """Train a model in which, at every step, only the selected channels exist.

    Args:
        model: a `ChannelModel`, or any module that maps images (N, C, H, W) to logits.
        selector: chooses the channels of each step; None for a model that has no choice.
        optimizer: its learning rates at this moment are what ``schedule`` scales.
        loss_fn: mean loss of (logits, labels).
        schedule: factor on the learning rate, see `dcx_kernels.train.schedule`.
        checkpoint_dir: where ``latest.safetensors`` goes; None writes no checkpoints.
        checkpoint_every: steps between checkpoints, beside the one after each epoch.
        log: where rows go.
        progress: what the user sees meanwhile.
        config: JSON values that identify the run; a checkpoint of another one is refused.

    Example:
        >>> trainer = Trainer(model, selector, optimizer)  # doctest: +SKIP
        >>> trainer.fit(loader, epochs=160, eval_loader=test_loader)  # doctest: +SKIP
        >>> model.set_active(selector.final())  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        selector: Selector | None,
        optimizer: Optimizer,
        *,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        schedule: Schedule = step_decay,
        checkpoint_dir: Path | None = None,
        checkpoint_every: int | None = None,
        log: Log | None = None,
        progress: Progress | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(model, ChannelModel) != (selector is not None):
            raise ValueError("expected a selector for a ChannelModel, and for nothing else")
        if checkpoint_every is not None and checkpoint_every < 1:
            raise ValueError(f"expected checkpoint_every to be positive, got {checkpoint_every}")
        self.model = model
        self.selector = selector
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.schedule = schedule
        self.checkpoint_path = None if checkpoint_dir is None else checkpoint_dir / CHECKPOINT
        self.checkpoint_every = checkpoint_every
        self.log = log if log is not None else Log(None)
        self.progress: Progress = progress if progress is not None else Silent()
        self.config = dict(config or {})
        self.position = Position()
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]

    def fit(
        self,
        loader: Loader,
        epochs: int,
        *,
        eval_loader: Loader | None = None,
        until: int | None = None,
    ) -> None:
        """Train from where the run is to the end of epoch ``epochs``.

        The first Ctrl-C ends it at the next step boundary, with a checkpoint.

        Args:
            loader: training batches.
            epochs: length of the whole schedule.
            eval_loader: evaluated after each epoch, with the selector's final channels.
            until: stop after this many epochs of the schedule; ``epochs`` if None.

        Raises:
            NonFiniteError: if a loss or saliency is not finite. Model, optimizer and selector are
                as before that step, and so is the checkpoint that was written.
            CheckpointError: if a checkpoint cannot be written.
            KeyboardInterrupt: after Ctrl-C.
        """
        self.progress.start(epochs, len(loader), self.position)
        snapshot = Snapshot(self.model, self.selector)
        end = epochs if until is None else min(epochs, until)
        with Interrupt() as interrupt, self.log:
            while self.position.epoch < end:
                began = time.perf_counter()
                factor = self.schedule(self.position.epoch, epochs)
                for group, base in zip(self.optimizer.param_groups, self._base_lrs, strict=True):
                    group["lr"] = base * factor
                self.model.train()
                for images, labels in loader.batches(self.position.epoch, self.position.batch):
                    loss, correct, step_ms = self._step(snapshot, images, labels)
                    self.position.count(loss, correct, labels.shape[0])
                    sets = self.model.active if isinstance(self.model, ChannelModel) else {}
                    self._report(step_row(self.position, loss, step_ms, sets, epochs * len(loader)))
                    due = self.position.step % (self.checkpoint_every or math.inf) == 0
                    if interrupt.requested or (due and self.position.batch < len(loader)):
                        self.save()
                    interrupt.raise_if_requested()
                self._finish_epoch(eval_loader, time.perf_counter() - began)
                interrupt.raise_if_requested()

    def _step(self, snapshot: Snapshot, images: Tensor, labels: Tensor) -> tuple[float, int, float]:
        """Do one step; returns loss, correct answers and milliseconds."""
        began = time.perf_counter()
        model, selector = self.model, self.selector
        snapshot.take()
        try:
            if selector is not None and isinstance(model, ChannelModel):
                model.set_active(selector.select())
            self.optimizer.zero_grad(set_to_none=True)
            logits = model(images)
            loss = self.loss_fn(logits, labels)
            readback = Readback(loss, logits, labels)
            loss.backward()
            loss_value, correct = readback.wait()  # sync point: waits for forward, not backward
            if not math.isfinite(loss_value):
                raise NonFiniteError(f"the loss is {loss_value}")
            if selector is not None and isinstance(model, ChannelModel):
                wanted = model.saliency_reduction if selector.needs_saliency else None
                selector.update({} if wanted is None else model.saliency(wanted))
        except NonFiniteError as error:
            raise self._undo(snapshot, error) from error
        self.optimizer.step()
        # on a GPU the optimizer still runs; the next readback waits for it, so sums are right
        return loss_value, correct, 1e3 * (time.perf_counter() - began)

    def _undo(self, snapshot: Snapshot, error: NonFiniteError) -> NonFiniteError:
        """Go back to before the step, keep that as a checkpoint, and say which step it was."""
        snapshot.restore()
        self.optimizer.zero_grad(set_to_none=True)
        self.save()
        where = f"step {self.position.step + 1} (epoch {self.position.epoch + 1})"
        kept = "" if self.checkpoint_path is None else f" and saved in {self.checkpoint_path}"
        return NonFiniteError(f"{where}: {error}; the state before it is kept{kept}")

    def _finish_epoch(self, eval_loader: Loader | None, seconds: float) -> None:
        sets = None if self.selector is None else self.selector.final()
        result = None
        if eval_loader is not None:
            result = evaluate(self.model, eval_loader, sets=sets, loss_fn=self.loss_fn)
        lr = self.optimizer.param_groups[0]["lr"]
        scores = None if self.selector is None else self.selector.scores
        self._report(epoch_row(self.position, lr, sets, result, seconds, scores))
        self.position.next_epoch()
        self.save()

    def _report(self, row: dict[str, Any]) -> None:
        self.log.write(**row)
        self.progress.show(self.position, row)

    def save(self) -> None:
        """Write the checkpoint; does nothing without ``checkpoint_dir``."""
        if self.checkpoint_path is not None:
            self.log.sync()
            checkpoint.save(self.checkpoint_path, state.capture(self))

    def load(self, path: Path) -> None:
        """Continue from a checkpoint; nothing changes if it does not fit.

        Raises:
            CheckpointError: if it cannot be read, or is of another model or run.
        """
        state.restore(self, checkpoint.load(path))
