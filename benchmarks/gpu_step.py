"""Training steps on a GPU: dense, mask, thin and sparse side by side, under autocast, NHWC.

One block is one network at one density; the correctness gate, on fewer and smaller images, comes
first. A short step is timed behind another one, as in a loop that never waits for the device.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks.arms import ARMS, CompiledArm, SparseArm, TrainingArm
from benchmarks.gate import check_training
from benchmarks.gpu import GpuKey, current_key, make_timer, require_gpu
from benchmarks.gpu_plan import Block, Budget, Progress, part_parser, run_plan, warm_share
from benchmarks.gpu_timer import StepTiming, Timer
from benchmarks.harness import PhaseClock, environment_set, ratio
from benchmarks.problem import Problem, Structure
from benchmarks.rows import GpuStepRow, RowWriter
from benchmarks.train_step import Gate, add_ratios, build_arms, gate_sets, step_row

__all__ = ["GPU_ARMS", "OUT", "Setup", "main", "measure_block", "plan", "setups"]

OUT = "benchmarks/results/train_step_gpu.csv"
ROUNDS, WARMUP = 20, 4
USUAL = ("dense", "mask", "thin", "sparse")
_SMALL_BATCH, _SMALL_EXTENT = 8, 64  # of the gate


class OwnArm(SparseArm):
    """Sparse, every convolution on our own kernels."""

    name = "sparse_own"
    settings = {"DCX_CONV": "own"}  # noqa: RUF012 - as in the class above


class LibraryArm(SparseArm):
    """Sparse, every convolution given to cuDNN, packed."""

    name = "sparse_library"
    settings = {"DCX_CONV": "library"}  # noqa: RUF012


class ReferenceArm(SparseArm):
    """Sparse, all of it in ATen."""

    name = "sparse_reference"
    settings = {"DCX_BACKEND": "reference"}  # noqa: RUF012


GPU_ARMS: dict[str, type[Any]] = {
    **ARMS,
    **{arm.name: arm for arm in (CompiledArm, OwnArm, LibraryArm, ReferenceArm)},
}


@dataclass(frozen=True)
class Setup:
    """One block: a problem, the arms and the regimes.

    Args:
        regimes: "fixed", "varying".
    """

    problem: Problem
    arms: tuple[str, ...] = USUAL
    regimes: tuple[str, ...] = ("fixed",)

    @property
    def name(self) -> str:
        """What messages call it."""
        p = self.problem
        grid = "full" if p.density == 1 else p.grid
        extras = [arm for arm in self.arms if arm not in USUAL] + list(self.regimes[1:])
        return " ".join([f"{p.label} b{p.batch} d={p.density:g} {grid}", *extras])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the time allows, write each row when it is there."""
    o = part_parser("gpu_step", __doc__ or "", OUT).parse_args(argv)
    if o.device == "cuda":
        require_gpu("benchmarks.gpu_step")
    else:
        torch.set_num_threads(1)  # those of tiny operators wait for each other
    budget, timer = Budget(o.seconds), make_timer(o.device)
    chosen = list(setups(o.device, o.tiny))
    if o.warm is not None:
        warm_share(plan(chosen, timer, None, lambda row: None, o.tiny), o.warm)
        return
    key = current_key(o.device, o.commit)
    with RowWriter(o.out, GpuStepRow, o.append) as writer:
        blocks = plan(chosen, timer, key, writer.write, o.tiny)
        run_plan(blocks, budget, Progress(o.progress))


def setups(device: str, tiny: bool) -> Iterator[Setup]:
    """Yield all blocks, the most important first, none twice."""
    seen = set()
    for setup in _tiny(device) if tiny else _in_order(device):
        if setup.problem.density == 1:
            setup = replace(setup, problem=replace(setup.problem, grid="aligned"))
        if setup not in seen:
            seen.add(setup)
            yield setup


def _in_order(device: str) -> Iterator[Setup]:
    sizes = {"vgg19": (1024, 32), "resnet18": (256, 224), "resnet50": (256, 224)}
    sizes["densenet121"] = (128, 224)

    def problem(
        model: str, density: float, grid: str, residual: Any = "keep", batch: int = 0
    ) -> Problem:
        usual, extent = sizes[model]
        return Problem(
            model, batch or usual, density, "NHWC", residual=residual, extent=extent,
            device=device, dtype="bfloat16", grid=grid,
        )  # fmt: skip

    half, ours = "aligned", ("sparse_own", "sparse_library", "sparse_reference")
    yield Setup(problem("vgg19", 0.5, half), (*USUAL, *ours))
    yield Setup(problem("resnet50", 0.5, half, "tie"))
    yield Setup(problem("resnet50", 0.5, half))
    yield Setup(problem("vgg19", 0.5, "odd"))
    yield Setup(problem("resnet18", 0.5, half, "tie"))
    yield Setup(problem("resnet18", 0.5, "odd"))
    yield Setup(problem("densenet121", 0.5, half))
    yield Setup(problem("vgg19", 0.3, "odd"))
    yield Setup(problem("vgg19", 1.0, half))
    for model in ("vgg19", "resnet18"):  # what the host costs
        yield Setup(problem(model, 0.5, half, batch=64), ("mask", "thin", "sparse"))
    yield Setup(problem("vgg19", 0.5, "odd"), ("thin", "sparse"), ("fixed", "varying"))
    yield Setup(problem("vgg19", 0.25, half))
    yield Setup(problem("resnet50", 0.5, "odd", "tie"))
    yield Setup(problem("vgg19", 0.5, half), ("thin", "compiled", "sparse"))
    yield Setup(problem("densenet121", 0.5, "odd"))
    for density, grid in itertools.product((0.5, 0.25, 0.3, 0.75, 1.0), (half, "odd")):
        yield Setup(problem("vgg19", density, grid))
        yield Setup(problem("resnet18", density, grid))
        yield Setup(problem("resnet18", density, grid, "tie"))
        yield Setup(problem("resnet50", density, grid))
        yield Setup(problem("resnet50", density, grid, "tie"))
        yield Setup(problem("densenet121", density, grid))
    yield Setup(problem("resnet18", 0.5, "odd"), ("thin", "sparse"), ("fixed", "varying"))
    yield Setup(problem("resnet50", 0.5, half), ("thin", "compiled", "sparse"))


def _tiny(device: str) -> Iterator[Setup]:
    def problem(model: str, density: float, grid: str, **more: Any) -> Problem:
        return Problem(model, 3, density, "NHWC", 1 / 16, device=device, grid=grid, **more)

    everything = (*USUAL, "sparse_own", "sparse_library", "sparse_reference", "compiled")
    yield Setup(problem("vgg19", 0.5, "odd", dtype="bfloat16"), everything)
    yield Setup(problem("resnet32", 0.5, "aligned", residual="tie"))
    yield Setup(problem("vgg19", 0.5, "aligned"), ("thin", "sparse"), ("fixed", "varying"))
    yield Setup(problem("vgg19", 1.0, "aligned"))


def plan(
    chosen: Sequence[Setup],
    timer: Timer,
    key: GpuKey | None,
    write: Callable[[GpuStepRow], None],
    tiny: bool,
) -> list[Block]:
    """Return the blocks.

    Args:
        key: of the rows; None where none is written.
        write: takes a row.
        tiny: few rounds.
    """
    rounds, warmup = (2, 1) if tiny else (ROUNDS, WARMUP)

    def block(setup: Setup) -> Block:
        def run() -> list[str]:
            assert key is not None
            rows = measure_block(setup, timer, key, rounds, warmup)
            for row in rows:
                write(row)
            times = (f"{row.arm} {row.regime}: {row.step_ms:.2f}" for row in rows)
            print(f"{setup.name}: {', '.join(times)} ms", flush=True)
            return []

        def warm() -> None:
            arms = [arm for arm in setup.arms if arm.startswith("sparse")]
            for problem in (_small(setup.problem), setup.problem):
                structure = Structure.of(problem.converted("sparse"))
                for arm in build_arms(problem, structure, arms, ("fixed",), GPU_ARMS):
                    _step(arm)
            _free(setup.problem.device)

        return Block(setup.name, run, warm)

    return [block(setup) for setup in chosen]


def measure_block(
    setup: Setup,
    timer: Timer,
    key: GpuKey,
    rounds: int,
    warmup: int,
    gate: Gate = check_training,
) -> list[GpuStepRow]:
    """Check and then time one configuration.

    Raises:
        GateError: if a result is wrong; then nothing was timed.
        ValueError: if the loss of an arm is not finite.
    """
    problem = setup.problem
    structure = Structure.of(problem.converted("sparse"))
    small = _small(problem)
    checked: list[Mapping[str, str]] = []
    for name in setup.arms:
        settings = GPU_ARMS[name].settings
        if name.startswith("sparse") and settings not in checked:
            checked.append(settings)
            with environment_set(settings):
                gate(small, gate_sets(structure, problem, setup.regimes))
    _free(problem.device)
    built, resident = [], []
    before = _allocated(problem.device)
    for arm in build_arms(problem, structure, setup.arms, setup.regimes, GPU_ARMS):
        _step(arm)
        arm.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        now = _allocated(problem.device)
        built.append(arm)
        resident.append(now - before)
        before = now
    rows = []
    timings = timer.steps(built, rounds, warmup)
    for arm, timing, bytes_ in zip(built, timings, resident, strict=True):
        if not math.isfinite(float(arm.loss)):
            raise ValueError(f"{arm.name}: expected a finite loss, got {float(arm.loss)}")
        rows.append(_row(key, problem, structure, arm, timing, bytes_))
    del built, arm
    _free(problem.device)
    return _with_ratios(rows)


def _small(problem: Problem) -> Problem:
    """Return what is checked: float64 takes its time."""
    batch, extent = min(problem.batch, _SMALL_BATCH), min(problem.extent, _SMALL_EXTENT)
    return replace(problem, batch=batch, extent=extent)


def _row(
    key: GpuKey,
    problem: Problem,
    structure: Structure,
    arm: TrainingArm,
    timing: StepTiming,
    resident: int,
) -> GpuStepRow:
    with environment_set(arm.settings):
        peak = resident + _transient(arm, problem.device)  # thin catches up with sparse's widths
        row = step_row(key.environment, problem, structure, arm, timing)
    return GpuStepRow(
        **asdict(row), gpu=key.gpu, cuda=key.cuda, driver=key.driver, triton=key.triton,
        extent=problem.extent, widths="full" if problem.density == 1 else problem.grid,
        cudnn_benchmark=arm.regime != "varying", host_ms=_median(timing.host), peak_bytes=peak,
    )  # fmt: skip


def _with_ratios(rows: Sequence[GpuStepRow]) -> list[GpuStepRow]:
    thin = {row.regime: row for row in rows if row.arm == "thin"}
    result = []
    for row in add_ratios(rows):
        assert isinstance(row, GpuStepRow)
        other = thin.get(row.regime)
        if row.arm.startswith("sparse") and other is not None:
            row = replace(
                row,
                host_over_thin=ratio(row.host_ms, other.host_ms),
                peak_over_thin=ratio(row.peak_bytes, other.peak_bytes or None),
            )
        result.append(row)
    return result


def _step(arm: TrainingArm) -> None:
    """Run one step, untimed; the first one makes what stays: momentum, buffers, compiled code."""
    with environment_set(arm.settings):
        arm.prepare()
        arm.step(PhaseClock())


def _transient(arm: TrainingArm, device: str) -> int:
    """Return what a step allocates at most, besides what was there before."""
    if device != "cuda":
        _step(arm)
        return 0
    arm.prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    arm.step(PhaseClock())
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return (ordered[len(ordered) // 2] + ordered[(len(ordered) - 1) // 2]) / 2


if __name__ == "__main__":
    main()
