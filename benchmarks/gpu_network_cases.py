"""What a step does for all layers of a network at once: weight slices, optimizer, selection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dcx_kernels as dcx
from benchmarks.arms import HYPER
from benchmarks.gpu_cases import Case, backend_of
from benchmarks.problem import Problem, SetStream, Structure
from dcx_kernels.kernels.slices import Slice

__all__ = ["NETWORK_CASES"]


class _Prepared:
    """A call with something to do before it, see `benchmarks.gpu_timer.Timer`."""

    def __init__(self, call: Callable[[], object], prepare: Callable[[], object]) -> None:
        self.call, self.prepare = call, prepare

    def __call__(self) -> object:
        return self.call()


def _gather(problem: Problem) -> Iterator[Case]:
    """Packing the active slices of all weights, which are float32."""
    dense, slices = [], []
    generator = torch.Generator().manual_seed(0)
    structure = Structure.of(problem.converted("sparse"))
    model = problem.converted("sparse")
    model.set_active(SetStream(structure, problem.density, False, 3, problem.grid).fresh())
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        axes = model.structure.axes[name]
        out, into = model.layer_sets[axes.out], model.layer_sets[axes.in_]
        lists = [None if s is None else s.to(problem.device).indices for s in (out, into)]
        if any(idx is not None for idx in lists):
            dense.append(torch.randn(layer.weight.shape, generator=generator).to(problem.device))
            slices.append(Slice(layer.weight.shape, *lists))
    ours, reference = backend_of(problem.device), backend_of(problem.device, "reference")
    packed = [t.clone() for t in reference.gather_slices(dense, slices)]

    def flat(parts: Any) -> Tensor:
        return torch.cat([part.flatten() for part in parts])

    moved = 2 * sum(t.numel() * t.element_size() for t in packed)
    yield _case(
        problem, "gather_slices", moved,
        {
            "own": lambda: ours.gather_slices(dense, slices),
            "torch": lambda: reference.gather_slices(dense, slices),
            "copy": lambda: [t.clone() for t in packed],
        },
        "torch", lambda: flat(packed).double(), dict.fromkeys(("own", "torch", "copy"), flat),
    )  # fmt: skip


def _optimizer(problem: Problem) -> Iterator[Case]:
    """SGD with Nesterov momentum; torch's is fused. Reads w, g, m and writes w, m."""
    structure = Structure.of(problem.converted("sparse"))
    sparse = problem.converted("sparse")
    stream = SetStream(structure, problem.density, False, 3, problem.grid)
    sets = stream.fresh()
    sparse.set_active(sets)
    thin = dcx.compact(sparse)
    small = Problem(problem.model, 2, problem.density, problem.layout, problem.width)
    images, labels = (t.to(problem.device) for t in small.data())
    arms: dict[str, Callable[[], Any]] = {}
    for name, model in (("own", sparse), ("thin", thin), ("dense", problem.network())):
        model = model.to(problem.device)
        if name == "own":
            optimizer: torch.optim.Optimizer = dcx.optim.SGD(model, **HYPER)
        else:
            optimizer = torch.optim.SGD(model.parameters(), fused=True, **HYPER)

        def gradients(model: Any = model, optimizer: Any = optimizer) -> None:
            if model is sparse:
                sparse.set_active(stream.fresh())
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()

        arms[name] = _Prepared(optimizer.step, gradients)
    moved = 5 * sum(p.numel() * p.element_size() for p in thin.parameters())
    yield _case(problem, "sgd_step", moved, arms, "dense")


def _selection(problem: Problem) -> Iterator[Case]:
    """CUCB's choice of the next sets, and its update with saliencies that lie on the device."""
    model = problem.converted("sparse")
    groups = {name: group for name, group in model.groups.items() if group.selectable}
    selector = dcx.selectors.CUCB(groups, density=min(problem.density, 0.9), tau=1)
    saliency: dict[str, Tensor] = {}

    def step() -> None:
        selector.update(saliency)
        selector.select()

    def observe() -> None:
        saliency.clear()
        for name, active in selector.select().items():
            saliency[name] = torch.rand(len(active)).to(problem.device)

    yield _case(problem, "selection", 0, {"own": _Prepared(step, observe)}, "own")


def _case(
    problem: Problem,
    op: str,
    moved: int,
    arms: dict[str, Callable[[], Any]],
    baseline: str,
    truth: Callable[[], Tensor] | None = None,
    compact: dict[str, Callable[[Any], Tensor]] | None = None,
) -> Case:
    return Case(
        op, f"{problem.label}, all layers", 0, problem.density, problem.grid, 0, 0, "float32",
        arms, baseline, truth, moved=moved, layout="-", compact=compact or {},
    )  # fmt: skip


# each takes a problem and yields cases
NETWORK_CASES = {"gather": _gather, "sgd": _optimizer, "selection": _selection}
