"""The settings of dynamic channel execution; the defaults are the paper's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dcx_kernels.errors import expected

__all__ = ["PROCEDURES", "RESIDUALS", "SELECTORS", "DCEConfig"]

PROCEDURES = ("two-stage", "single-stage")
SELECTORS = ("cucb", "random", "static")
RESIDUALS = ("keep", "tie", "union")


@dataclass(frozen=True)
class DCEConfig:
    """Everything that determines a run beside model and data.

    Args:
        density: kept fraction of all selectable channels.
        selector: ``cucb``; ``random`` draws new channels each step and the final ones at random;
            ``static`` keeps the same share of the first channels of every group throughout.
        residual: channels joined by an add: ``keep`` them all, as the paper; ``tie`` them, so that
            the residual stream shrinks too; or the ``union`` of each branch's own, see
            `dcx_kernels.convert`.
        procedure: ``two-stage`` selects for all epochs, then builds the thin network and repeats
            the whole training; ``single-stage`` selects for ``select_epochs``, then freezes the
            topology while momentum and schedule continue.
        epochs: length of the learning-rate schedule.
        select_epochs: epochs of selection of the single-stage procedure; a quarter if None.
        finetune_epochs: epochs of the thin network; if None, ``epochs`` in the two-stage procedure
            and none in the single-stage one.
        batch_size: images per step.
        lr: learning rate before its schedule divides it by 10 at 50 % and 75 % of the epochs.
        momentum: Nesterov momentum, without dampening.
        weight_decay: factor on the weights that is added to their gradient.
        inactive: ``frozen`` leaves weight and momentum of inactive channels alone, ``decay`` lets
            them go on, as a masked PyTorch loop does.
        saliency: reduction over the batch, ``batch`` or ``sample``.
        tau: random steps at the start; None: until each channel was active once.
        min_active: least channels of a group.
        round_to: group widths are multiples of this.
        recalibrate: measure batch-norm statistics again for the final selection.
        recalibrate_batches: how many training batches that uses at most.
        augment: augment the training images as suits the data (CIFAR: pad, crop, flip).
        seed: of initial weights, data order and selector.

    References:
        Spasov and Lio, "Dynamic Neural Network Channel Execution for Efficient Training",
        sections 3.3 and 3.4. https://arxiv.org/abs/1905.06435
    """

    density: float = 0.4
    selector: Literal["cucb", "random", "static"] = "cucb"
    residual: Literal["keep", "tie", "union"] = "keep"
    procedure: Literal["two-stage", "single-stage"] = "two-stage"
    epochs: int = 160
    select_epochs: int | None = None
    finetune_epochs: int | None = None
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    inactive: Literal["frozen", "decay"] = "frozen"
    saliency: Literal["batch", "sample"] = "batch"
    tau: int | None = None
    min_active: int = 1
    round_to: int = 1
    recalibrate: bool = True
    recalibrate_batches: int = 100
    augment: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(expected("a density in (0, 1]", self.density))
        for name, choices in (
            ("selector", SELECTORS),
            ("residual", RESIDUALS),
            ("procedure", PROCEDURES),
            ("inactive", ("frozen", "decay")),
            ("saliency", ("batch", "sample")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(expected(f"{name} to be one of {choices}", getattr(self, name)))
        for name in ("epochs", "batch_size", "min_active", "round_to", "recalibrate_batches"):
            _positive(name, getattr(self, name))
        for name in ("select_epochs", "tau"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        if self.finetune_epochs is not None and self.finetune_epochs < 0:
            raise ValueError(expected("finetune_epochs of at least 0", self.finetune_epochs))
        if not self.lr > 0:
            raise ValueError(expected("a positive learning rate", self.lr))
        if not 0 <= self.momentum < 1:
            raise ValueError(expected("a momentum in [0, 1)", self.momentum))
        if not self.weight_decay >= 0:
            raise ValueError(expected("weight_decay of at least 0", self.weight_decay))
        if self.select_epochs is not None and self.select_epochs > self.epochs:
            raise ValueError(expected(f"at most {self.epochs} select_epochs", self.select_epochs))

    @property
    def selection_epochs(self) -> int:
        """Epochs in which channels are selected."""
        if self.procedure == "two-stage":
            return self.epochs
        return self.select_epochs or max(1, self.epochs // 4)

    @property
    def thin_epochs(self) -> int:
        """Epochs the thin network is trained for; single-stage has none unless it asks for some."""
        if self.finetune_epochs is not None:
            return self.finetune_epochs
        return self.epochs if self.procedure == "two-stage" else 0


def _positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(expected(f"{name} to be a positive whole number", repr(value)))
