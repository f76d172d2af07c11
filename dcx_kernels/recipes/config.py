"""The settings of the papers' procedures; the defaults are the papers'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from dcx_kernels.data.augment import check_augment
from dcx_kernels.errors import expected
from dcx_kernels.selectors.dcp import DECAY_SCOPES, INITIAL, DecayScope, Initial
from dcx_kernels.selectors.schedules import POLICIES, Policy, utility_decay
from dcx_kernels.train.schedule import Schedule, multi_step, step_decay

__all__ = ["FINALS", "METHODS", "PROCEDURES", "RESIDUALS", "DCEConfig", "DCPConfig", "TrainConfig"]

PROCEDURES = ("two-stage", "single-stage")
FINALS = ("best", "random")
RESIDUALS = ("keep", "tie", "union")
_WARMUP_EPOCHS, _WARMUP_SHARE = 10, 6


@dataclass(frozen=True)
class TrainConfig:
    """What every procedure that selects channels while it trains has to be told.

    Args:
        density: kept fraction of all selectable channels.
        selector: the method's own; ``random`` draws new channels each step and the final ones at
            random; ``static`` keeps the same share of the first channels of every group throughout.
        residual: channels joined by an add: ``keep`` them all, as the papers; ``tie`` them, so that
            the residual stream shrinks too; or the ``union`` of each branch's own, see
            `dcx_kernels.convert`.
        epochs: length of the learning-rate schedule.
        batch_size: images per step.
        lr: learning rate before its schedule divides it by 10, twice or more.
        momentum: of SGD, without dampening.
        weight_decay: factor on the weights that is added to their gradient.
        inactive: ``frozen`` leaves weight and momentum of inactive channels alone, ``decay`` lets
            them go on, as a masked PyTorch loop does.
        saliency: reduction over the batch, ``batch`` or ``sample``.
        min_active: least channels of a group.
        round_to: group widths are multiples of this.
        recalibrate: measure batch-norm statistics again for the final selection.
        recalibrate_batches: how many training batches that uses at most.
        augment: augment the training images as suits the data (CIFAR: pad, crop, flip), or how, by
            name: one of `dcx_kernels.data.AUGMENTATIONS`.
        seed: of initial weights, data order and selector.

    Raises:
        ValueError: naming the setting that is out of range.
    """

    density: float = 0.4
    selector: str = "static"
    residual: Literal["keep", "tie", "union"] = "keep"
    epochs: int = 160
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    inactive: Literal["frozen", "decay"] = "frozen"
    saliency: Literal["batch", "sample"] = "batch"
    min_active: int = 1
    round_to: int = 1
    recalibrate: bool = True
    recalibrate_batches: int = 100
    augment: bool | str = True
    seed: int = 0

    method: ClassVar[str]
    title: ClassVar[str]
    selectors: ClassVar[tuple[str, ...]]
    nesterov: ClassVar[bool]

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(expected("a density in (0, 1]", self.density))
        self._check_choice("selector", self.selectors)
        self._check_choice("residual", RESIDUALS)
        self._check_choice("inactive", ("frozen", "decay"))
        self._check_choice("saliency", ("batch", "sample"))
        for name in ("epochs", "batch_size", "min_active", "round_to", "recalibrate_batches"):
            self._check_positive(name)
        if isinstance(self.augment, str):
            check_augment(self.augment)
        if not self.lr > 0:
            raise ValueError(expected("a positive learning rate", self.lr))
        if not 0 <= self.momentum < 1:
            raise ValueError(expected("a momentum in [0, 1)", self.momentum))
        if not self.weight_decay >= 0:
            raise ValueError(expected("weight_decay of at least 0", self.weight_decay))

    @classmethod
    def names(cls) -> frozenset[str]:
        """Return the names of the settings."""
        return frozenset(field.name for field in fields(cls))

    @property
    def schedule(self) -> Schedule:
        """Factor on the learning rate."""
        raise NotImplementedError

    @property
    def selecting(self) -> range:
        """Epochs in which the channels change from step to step."""
        raise NotImplementedError

    @property
    def thin_epochs(self) -> int:
        """Epochs the thin network is trained for."""
        raise NotImplementedError

    def _check_choice(self, name: str, choices: Sequence[str]) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(expected(f"{name} to be one of {choices}", getattr(self, name)))

    def _check_positive(self, name: str, least: int = 1) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            what = "a positive whole number" if least else "a whole number of at least 0"
            raise ValueError(expected(f"{name} to be {what}", repr(value)))


@dataclass(frozen=True)
class DCEConfig(TrainConfig):
    """Everything that determines a run of dynamic channel execution beside model and data.

    The learning rate is divided by 10 at 50 % and 75 % of the epochs; the momentum is Nesterov's.

    Args (beside those of `TrainConfig`):
        selector: ``cucb``, ``random`` or ``static``.
        procedure: ``two-stage`` selects for all epochs, then builds the thin network and repeats
            the whole training; ``single-stage`` selects for ``select_epochs``, then freezes the
            topology while momentum and schedule continue.
        select_epochs: epochs of selection of the single-stage procedure; a quarter if None.
        finetune_epochs: epochs of the thin network; if None, ``epochs`` in the two-stage procedure
            and none in the single-stage one.
        tau: random steps at the start; None: until each channel was active once.
        final: ``best`` keeps the channels of the highest mean saliency, ``random`` draws them after
            the same training: the baseline of section 3.4.

    References:
        Spasov and Lio, "Dynamic Neural Network Channel Execution for Efficient Training",
        sections 3.3 and 3.4. https://arxiv.org/abs/1905.06435
    """

    selector: str = "cucb"
    procedure: Literal["two-stage", "single-stage"] = "two-stage"
    select_epochs: int | None = None
    finetune_epochs: int | None = None
    tau: int | None = None
    final: Literal["best", "random"] = "best"

    method: ClassVar[str] = "dce"
    title: ClassVar[str] = "Dynamic channel execution"
    selectors: ClassVar[tuple[str, ...]] = ("cucb", "random", "static")
    nesterov: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("procedure", PROCEDURES)
        self._check_choice("final", FINALS)
        if self.final == "random" and self.selector == "static":
            raise ValueError(expected("final='best' with the selector static", "random"))
        for name in ("select_epochs", "tau"):
            if getattr(self, name) is not None:
                self._check_positive(name)
        if self.finetune_epochs is not None and self.finetune_epochs < 0:
            raise ValueError(expected("finetune_epochs of at least 0", self.finetune_epochs))
        if self.select_epochs is not None and self.select_epochs > self.epochs:
            raise ValueError(expected(f"at most {self.epochs} select_epochs", self.select_epochs))

    @property
    def schedule(self) -> Schedule:
        """Factor on the learning rate."""
        return step_decay

    @property
    def selection_epochs(self) -> int:
        """Epochs in which channels are selected."""
        if self.procedure == "two-stage":
            return self.epochs
        return self.select_epochs or max(1, self.epochs // 4)

    @property
    def selecting(self) -> range:
        """Epochs in which the channels change from step to step."""
        return range(self.selection_epochs)

    @property
    def thin_epochs(self) -> int:
        """Epochs the thin network is trained for; single-stage has none unless it asks for some."""
        if self.finetune_epochs is not None:
            return self.finetune_epochs
        return self.epochs if self.procedure == "two-stage" else 0


@dataclass(frozen=True)
class DCPConfig(TrainConfig):
    """Everything that determines a run of dynamic channel propagation beside model and data.

    The thin network is cut out of the trained one and not fine-tuned. The paper does not say how
    long it trains: epochs, batch and warm-up are those of its code for VGG-16. From a trained model
    that code has ``lr=0.01, decay=0.7``.

    Args (beside those of `TrainConfig`):
        selector: ``dcp``, ``random`` or ``static``; the two others have no warm-up.
        milestones: 0-based epochs at which the learning rate is divided by 10 and lambda moves; a
            third and two thirds of the epochs if None.
        warmup_epochs: epochs at the start in which all channels are active; if None, 10, but no
            more than a sixth of the epochs, and at least one.
        decay: lambda, the factor on a utility before a saliency is added, at the start.
        decay_policy: how it moves at the milestones: ``increase``, ``divide`` or ``constant``, see
            `dcx_kernels.selectors.utility_decay`.
        decay_scope: whether it applies to ``selected`` channels or to ``all``.
        strict: select by the threshold of eq. 2 to the letter, see `dcx_kernels.selectors.DCP`.
        initial: utilities at the start: ``zero`` or ``inverse``, one by the number of channels; if
            None, as in the paper's code: ``inverse`` for networks of residual blocks, else zero.

    References:
        Shen et al., "Learning to Prune in Training via Dynamic Channel Propagation", section IV.
        https://arxiv.org/abs/2007.01486
    """

    selector: str = "dcp"
    epochs: int = 200
    saliency: Literal["batch", "sample"] = "sample"
    recalibrate: bool = False
    milestones: tuple[int, ...] | None = None
    warmup_epochs: int | None = None
    decay: float = 0.6
    decay_policy: Policy = "increase"
    decay_scope: DecayScope = "selected"
    strict: bool = False
    initial: Initial | None = None

    method: ClassVar[str] = "dcp"
    title: ClassVar[str] = "Dynamic channel propagation"
    selectors: ClassVar[tuple[str, ...]] = ("dcp", "random", "static")
    nesterov: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("decay_policy", POLICIES)
        self._check_choice("decay_scope", DECAY_SCOPES)
        if self.initial is not None:
            self._check_choice("initial", INITIAL)
        if not 0 <= self.decay <= 1:
            raise ValueError(expected("a decay from 0 to 1", self.decay))
        if self.warmup_epochs is not None:
            self._check_positive("warmup_epochs", least=0)
            if self.warmup_epochs > self.epochs:
                what = f"at most {self.epochs} warmup_epochs"
                raise ValueError(expected(what, self.warmup_epochs))
        if self.milestones is not None:
            # a list of the same means the same run
            object.__setattr__(self, "milestones", tuple(self.milestones))
            utility_decay(self.decay_policy, self.milestones)  # refuses what does not rise

    @property
    def moves(self) -> tuple[int, ...]:
        """Epochs at which learning rate and lambda move."""
        if self.milestones is not None:
            return self.milestones
        thirds = (-(-self.epochs // 3), -(-2 * self.epochs // 3))
        return tuple(sorted(set(thirds)))

    @property
    def warmup(self) -> int:
        """Epochs at the start in which all channels are active."""
        if self.selector != "dcp":
            return 0
        if self.warmup_epochs is not None:
            return self.warmup_epochs
        return max(1, min(_WARMUP_EPOCHS, self.epochs // _WARMUP_SHARE))

    @property
    def schedule(self) -> Schedule:
        """Factor on the learning rate."""
        return multi_step(self.moves)

    @property
    def selecting(self) -> range:
        """Epochs in which the channels change from step to step."""
        return range(self.warmup, self.epochs)

    @property
    def thin_epochs(self) -> int:
        """None: the thin network is not trained any further."""
        return 0

    def decay_steps(self, steps_per_epoch: int) -> dict[int, float]:
        """Return lambda by step, see `dcx_kernels.selectors.DCP`."""
        steps = [epoch * steps_per_epoch for epoch in self.moves]
        return utility_decay(self.decay_policy, steps, self.decay)


METHODS: dict[str, type[DCEConfig] | type[DCPConfig]] = {"dce": DCEConfig, "dcp": DCPConfig}
