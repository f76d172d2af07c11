"""The arms of the training-step benchmark: dense, mask, thin, sparse."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dcx_kernels as dcx
from benchmarks.harness import PhaseClock
from benchmarks.problem import LAYOUTS, Problem, SetStream, Structure, Widths
from dcx_kernels.train.memory import saved_bytes

__all__ = [
    "ARMS", "HYPER", "CompiledArm", "DenseArm", "MaskArm", "SparseArm", "ThinArm", "TrainingArm",
]  # fmt: skip

HYPER: dict[str, Any] = {
    "lr": 0.01,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 1e-4,
}
_THIN_WARMUP = 1  # compile the library's code for new widths, allocate momentum and caches


class TrainingArm:
    """A step of SGD on one batch; subclasses say what network and which sets.

    Several steps may be prepared before they are run, in order.

    Attributes:
        widths: of every selectable group in the step that was prepared last.
        settings: environment variables under which it runs.
    """

    settings: ClassVar[Mapping[str, str]] = {}

    name = ""
    regime = "any"
    needs_lead_in = False  # all of VGG-19 with its gradients is far larger than any cache
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, problem: Problem, structure: Structure) -> None:
        self.problem, self.structure = problem, structure
        self.images, self.labels = problem.data()
        self.widths: Widths = dict(structure.channels)
        self.loss = torch.tensor(float("nan"))

    def prepare(self) -> None:
        """Make the inputs of the next step."""

    def step(self, clock: PhaseClock) -> None:
        """Run one step."""
        clock.start()
        self._train(clock)

    def _train(self, clock: PhaseClock) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        clock.lap("zero_grad")
        loss = self._loss()
        clock.lap("forward")
        loss.backward()
        self.loss = loss.detach()
        del loss  # the graph goes here, in every arm
        clock.lap("backward")
        self._read_saliency(clock)
        self.optimizer.step()
        clock.lap("optimizer")

    def _read_saliency(self, clock: PhaseClock) -> None:
        pass

    def _plain(self, model: nn.Module) -> None:
        form = LAYOUTS[self.problem.layout]
        self.model = model.to(self.problem.device, memory_format=form)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(self.model.parameters(), fused=True, **HYPER)

    def macs(self) -> int:
        """Count the multiply-accumulates that are computed for one image's forward."""
        return self.structure.macs(self.widths)

    def saved_bytes(self) -> int:
        """Count what a forward at the latest widths keeps for backward."""
        self.optimizer.zero_grad(set_to_none=True)
        return saved_bytes(self._loss, self.model)

    def saved_weight_bytes(self) -> int:
        """Count the packed weights among `saved_bytes`: leaves with a gradient, not parameters.

        They stand in for the thin network's parameters, which `saved_bytes` leaves out.
        """
        self.optimizer.zero_grad(set_to_none=True)
        parameters = {parameter.data_ptr() for parameter in self.model.parameters()}
        packed: dict[int, int] = {}

        def look(tensor: Tensor) -> Tensor:
            if tensor.is_leaf and tensor.requires_grad and tensor.data_ptr() not in parameters:
                packed[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
            self._loss()
        return sum(packed.values())

    def _loss(self) -> Tensor:
        with self.problem.autocast():
            return F.cross_entropy(self.model(self.images), self.labels)


class DenseArm(TrainingArm):
    """The plain network, all channels."""

    name = "dense"

    def __init__(self, problem: Problem, structure: Structure, stream: SetStream) -> None:
        super().__init__(problem, structure)
        self._plain(problem.network())


class MaskArm(TrainingArm):
    """The papers' baseline, strongest form: no saliency, torch's fused optimizer on everything."""

    name = "mask"

    def __init__(self, problem: Problem, structure: Structure, stream: SetStream) -> None:
        super().__init__(problem, structure)
        self.stream = stream
        self.masked = problem.converted("mask")
        self._plain(self.masked)
        self._sets: deque[Any] = deque()

    def prepare(self) -> None:
        """Draw the sets."""
        self._sets.append(self.stream.fresh())

    def step(self, clock: PhaseClock) -> None:
        """Set the masks, run one step."""
        clock.start()
        self.masked.set_active(self._sets.popleft())
        clock.lap("set_active")
        self._train(clock)


class SparseArm(TrainingArm):
    """Ours, with saliency measured and read."""

    name = "sparse"
    needs_lead_in = True

    def __init__(self, problem: Problem, structure: Structure, stream: SetStream) -> None:
        super().__init__(problem, structure)
        self.stream = stream
        self.regime = "varying" if stream.varying else "fixed"
        self.sparse = problem.converted("sparse", saliency="batch")
        self.model = self.sparse
        self.optimizer = dcx.optim.SGD(self.sparse, **HYPER)
        self._sets: deque[Any] = deque()

    def prepare(self) -> None:
        """Draw the sets."""
        self._sets.append(self.stream.fresh())
        self.widths = self.stream.widths

    def macs(self) -> int:
        """Count what the latest sets compute."""
        return dcx.cost(self.sparse).macs

    def step(self, clock: PhaseClock) -> None:
        """Set the channels, run one step."""
        clock.start()
        self.sparse.set_active(self._sets.popleft())
        clock.lap("set_active")
        self._train(clock)

    def _read_saliency(self, clock: PhaseClock) -> None:
        self.sparse.saliency()
        clock.lap("saliency")


class ThinArm(TrainingArm):
    """A plain torch network built at the widths of the sparse arm, warmed up before it is timed.

    When widths vary it is built anew, untimed, for widths that the sparse arm has run *before*:
    else the library would have compiled them already when the sparse arm meets them.
    """

    name = "thin"
    needs_lead_in = True

    def __init__(self, problem: Problem, structure: Structure, stream: SetStream) -> None:
        super().__init__(problem, structure)
        self.stream = stream
        self.regime = "varying" if stream.varying else "fixed"
        self._donor = problem.converted("sparse")
        self.widths = {}

    def prepare(self) -> None:
        """Build and warm up the network if there are new widths."""
        sets = self.stream.latest
        if self.widths == self.stream.widths:
            return
        self.widths = self.stream.widths
        self._donor.set_active(sets)
        self._plain(dcx.compact(self._donor))
        self._compile()
        for _ in range(_THIN_WARMUP):
            self._train(PhaseClock())

    def _compile(self) -> None:
        pass

    def macs(self) -> int:
        """Count what the network computes."""
        return dcx.cost(self._donor).macs


class CompiledArm(ThinArm):
    """The thin network under `torch.compile`."""

    name = "compiled"

    def _compile(self) -> None:
        # a dry run has no time for inductor
        backend = "inductor" if self.problem.device == "cuda" else "eager"
        self._run = torch.compile(self.model, backend=backend)

    def _loss(self) -> Tensor:
        with self.problem.autocast():
            return F.cross_entropy(self._run(self.images), self.labels)


ARMS = {arm.name: arm for arm in (DenseArm, MaskArm, ThinArm, SparseArm)}
