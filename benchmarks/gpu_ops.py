"""Operators on a GPU: our kernels, cuDNN on packed tensors, torch thin, masked and dense.

Each result is checked before it is timed. One block is one layer at one density.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gate import GateError, check_float32
from benchmarks.gpu import Ceilings, GpuKey, current_key, make_timer, require_gpu
from benchmarks.gpu_cases import (
    CONV_LAYERS,
    NORM_LAYERS,
    TINY,
    UNION_LAYERS,
    Case,
    Conv,
    conv_cases,
    norm_cases,
    union_cases,
)
from benchmarks.gpu_network_cases import NETWORK_CASES
from benchmarks.gpu_plan import (
    Block,
    Budget,
    Progress,
    is_broken,
    part_parser,
    run_plan,
    short,
    warm_share,
)
from benchmarks.gpu_timer import Samples, Timer
from benchmarks.harness import cudnn_flags
from benchmarks.problem import Problem
from benchmarks.rows import GpuOpRow, RowWriter

__all__ = ["OUT", "check_case", "main", "measure_case", "plan"]

OUT = "benchmarks/results/ops_gpu.csv"
# the most important first: all channels against cuDNN, then half of them
POINTS = (
    (1.0, "aligned"), (0.5, "aligned"), (0.5, "odd"), (0.25, "aligned"), (0.3, "odd"),
    (0.75, "aligned"), (0.25, "odd"), (0.3, "aligned"), (0.75, "odd"),
)  # fmt: skip
ROUNDS, WARMUP = 20, 4

Write = Callable[[GpuOpRow], None]
Cases = Callable[[], Iterator[Case]]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the time allows, write each row when it is there."""
    o = part_parser("gpu_ops", __doc__ or "", OUT).parse_args(argv)
    if o.device == "cuda":
        require_gpu("benchmarks.gpu_ops")
        torch.backends.cudnn.benchmark = True  # the strongest baseline, in all arms
    else:
        torch.set_num_threads(1)  # those of tiny operators wait for each other
    budget, timer = Budget(o.seconds), make_timer(o.device)
    dtype = torch.float32 if o.device == "cpu" else torch.bfloat16
    if o.warm is not None:
        nowhere: Write = lambda row: None  # noqa: E731
        blocks = plan(o.device, dtype, o.tiny, timer, Ceilings(1.0, 1.0), None, nowhere)
        warm_share(blocks, o.warm)
        return
    ceilings = Ceilings.measure(timer, o.device, dtype, o.tiny)
    copy, product = ceilings.copy_gb_per_s, ceilings.matmul_tflop_per_s
    print(f"copy {copy:.0f} GB/s, matrix product {product:.0f} TFLOP/s", flush=True)
    key = current_key(o.device, o.commit)
    with RowWriter(o.out, GpuOpRow, o.append) as writer:
        blocks = plan(o.device, dtype, o.tiny, timer, ceilings, key, writer.write)
        run_plan(blocks, budget, Progress(o.progress))


def plan(
    device: str,
    dtype: torch.dtype,
    tiny: bool,
    timer: Timer,
    ceilings: Ceilings,
    key: GpuKey | None,
    write: Write,
) -> list[Block]:
    """Return all blocks, the most important first.

    Args:
        key: of the rows; None where none is written.
        write: takes a row.
    """
    kinds: list[tuple[str, Any, dict[str, Conv]]] = [
        ("conv", conv_cases, TINY if tiny else CONV_LAYERS),
        ("norm", norm_cases, TINY if tiny else NORM_LAYERS),
        ("union", union_cases, TINY if tiny else UNION_LAYERS),
    ]
    named: list[tuple[str, Cases]] = []
    for density, grid in POINTS[:3] if tiny else POINTS:
        for kind, cases, layers in kinds:
            if kind == "union" and density == 1:
                continue  # a plain sum
            for name, layer in layers.items():
                made = functools.partial(cases, name, layer, density, grid, device, dtype)
                named.append((f"{kind} {name} d={density:g} {grid}", made))
        if density < 1 and grid == "aligned":
            width = 1 / 16 if tiny else 1.0
            problem = Problem("vgg19", 2, density, "NHWC", width, device=device, grid=grid)
            for kind, cases in NETWORK_CASES.items():
                made = functools.partial(cases, problem)
                named.append((f"{kind} vgg19 d={density:g} {grid}", made))
    rounds, warmup = (2, 1) if tiny else (ROUNDS, WARMUP)

    def block(name: str, cases: Cases) -> Block:
        def run() -> list[str]:
            notes: list[str] = []
            for case in cases():
                notes += _measure(case, rounds, warmup, timer, ceilings, key, write)
            print(name, flush=True)
            return notes

        def warm() -> None:
            for case in cases():
                _prepared(case.arms["own"])()

        return Block(name, run, warm)

    return list(itertools.starmap(block, named))


def _measure(
    case: Case,
    rounds: int,
    warmup: int,
    timer: Timer,
    ceilings: Ceilings,
    key: GpuKey | None,
    write: Write,
) -> list[str]:
    """Check and time one operator; return what is wrong."""
    assert key is not None
    errors, notes = check_case(case)
    arms = {name: call for name, call in case.arms.items() if name in errors}
    for row in measure_case(case, arms, errors, rounds, warmup, timer, ceilings, key):
        write(row)
    return notes


def check_case(case: Case) -> tuple[dict[str, float | None], list[str]]:
    """Compare every arm with the more exact result.

    Returns:
        The relative error of each arm that is right (None where nothing can be compared), and what
        is wrong with the others.
    """
    errors: dict[str, float | None] = {}
    if case.truth is None:
        return dict.fromkeys(case.arms), []
    truth = _exactly(case.truth)
    floor = _floor(case.dtype)
    own = _result(case, case.baseline, truth)
    notes = []
    for name in case.arms:
        if name in case.unchecked:
            errors[name] = None
            continue
        what = f"{case.name}: {name}"
        try:
            errors[name] = check_float32(_result(case, name, truth), own, truth, what, floor)
        except Exception as error:
            if is_broken(error):
                raise
            notes.append(f"{what} left out: {short(error)}")
    return errors, notes


def measure_case(
    case: Case,
    arms: dict[str, Callable[[], Any]],
    errors: dict[str, float | None],
    rounds: int,
    warmup: int,
    timer: Timer,
    ceilings: Ceilings,
    key: GpuKey,
) -> Iterator[GpuOpRow]:
    """Time the arms, interleaved, and yield a row each."""
    times = dict(zip(arms, timer.time(list(arms.values()), rounds, warmup), strict=True))
    base = times[case.baseline].median if case.baseline in times else None
    bound = ceilings.bound_us(case.macs, case.moved)
    for arm, samples in times.items():
        median = samples.median
        yield GpuOpRow(
            **key.columns(), copy_gb_per_s=ceilings.copy_gb_per_s,
            matmul_tflop_per_s=ceilings.matmul_tflop_per_s, layout=case.layout, dtype=case.dtype,
            batch=case.batch, layer=case.layer, op=case.op, density=case.density,
            widths=case.widths, c_in=case.c_in, c_out=case.c_out, arm=arm,
            rounds=len(samples.device), median_us=median, p20_us=samples.percentile(20),
            p80_us=samples.percentile(80), host_us=_median(samples.host),
            tflop_per_s=2e-6 * case.macs / median if case.macs else None,
            gb_per_s=1e-3 * case.moved / median if case.moved else None,
            roofline=bound / median if bound else None,
            over_torch=None if base is None else median / base, error=errors[arm],
        )  # fmt: skip


def _exactly(truth: Callable[[], Tensor]) -> Tensor:
    """Run without tf32, and without tuning: nobody times it."""
    with cudnn_flags(benchmark=False, allow_tf32=False):
        return truth().double()


def _result(case: Case, arm: str, truth: Tensor) -> Tensor:
    """Run an arm on memory that, as far as the allocator is obliging, holds NaN."""
    call = _prepared(case.arms[arm])
    poison = torch.full_like(truth, torch.nan, dtype=getattr(torch, case.dtype))
    del poison
    result = call()
    compact = case.compact.get(arm)
    tensor: Tensor = result if compact is None else compact(result)
    if tensor.shape != truth.shape:
        raise GateError(f"expected the shape {tuple(truth.shape)}, got {tuple(tensor.shape)}")
    return tensor.double()


def _prepared(call: Callable[[], Any]) -> Callable[[], Any]:
    prepare = getattr(call, "prepare", None)
    if prepare is not None:
        prepare()
    return call


def _floor(dtype: str) -> float:
    """Return a relative error that is as good as none: an eighth of the distance of neighbours."""
    return max(1e-6, torch.finfo(getattr(torch, dtype)).eps / 8)


def _median(values: Sequence[float]) -> float:
    return Samples(list(values)).median


if __name__ == "__main__":
    main()
