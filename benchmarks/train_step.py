"""Time of one training step: dense, mask, thin and sparse side by side, both regimes.

One block per network, residual policy, layout and density: the correctness gate, then every arm
interleaved with every other.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.arms import ARMS, TrainingArm
from benchmarks.environment import Environment, current_environment
from benchmarks.gate import Sets, check_training
from benchmarks.harness import PHASES, Timing, measure, ratio
from benchmarks.plot import draw
from benchmarks.problem import LAYOUTS, Problem, SetStream, Structure
from benchmarks.rows import RowWriter, StepRow
from benchmarks.table import print_tables

__all__ = ["Gate", "add_ratios", "build_arms", "gate_sets", "main", "measure_block", "step_row"]

REGIMES = ("fixed", "varying")
POLICIES = ("keep", "tie", "union")
DENSITIES = "0.2,0.25,0.3,0.4,0.5,0.6,0.75,0.9,1.0"

Gate = Callable[[Problem, Sequence[Sets]], None]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the blocks, write each row when it is there, print tables, draw the plot."""
    options = _parser().parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    environment, rows = current_environment(), []
    with RowWriter(options.out, StepRow, options.append) as writer:
        for problem in _problems(options):
            print(f"{problem.label} batch {problem.batch} {problem.layout} d={problem.density:g}")
            block = measure_block(
                problem, options.arms, options.regimes, environment,
                options.rounds, options.warmup, options.lead_in,
            )  # fmt: skip
            for row in block:
                writer.write(row)
                print(f"  {row.arm:7}{row.regime:8}{row.step_ms:9.2f} ms", flush=True)
            rows += block
    print_tables(rows)
    print(f"rows: {options.out}\nplot: {draw(options.out)}")


def measure_block(
    problem: Problem,
    arms: Sequence[str],
    regimes: Sequence[str],
    environment: Environment,
    rounds: int,
    warmup: int = 3,
    lead_in: int = 1,
    gate: Gate = check_training,
) -> list[StepRow]:
    """Check and then time one configuration.

    Args:
        problem: the configuration.
        arms: names of `benchmarks.arms.ARMS`.
        regimes: "fixed", "varying"; at density 1 there is nothing to vary, and no such row.
        environment: the key of every row.
        rounds, warmup, lead_in: see `benchmarks.harness.measure`.
        gate: raises if a result is wrong.

    Raises:
        GateError: then nothing was timed.
    """
    structure = Structure.of(problem.converted("sparse"))
    if problem.density >= 1:
        regimes = [regime for regime in regimes if regime == "fixed"]
    gate(problem, gate_sets(structure, problem, regimes))
    built = list(build_arms(problem, structure, arms, regimes))
    rows = []
    for arm, timing in zip(built, measure(built, rounds, warmup, lead_in), strict=True):
        if not math.isfinite(float(arm.loss)):
            raise ValueError(f"{arm.name}: expected a finite loss, got {float(arm.loss)}")
        arm.prepare()  # thin catches up with the latest widths of sparse
        rows.append(step_row(environment, problem, structure, arm, timing))
    return add_ratios(rows)


def add_ratios(rows: Sequence[StepRow]) -> list[StepRow]:
    """Fill the ratio columns of the rows of one block."""
    by = {(row.arm, row.regime): row for row in rows}

    def time(arm: str, regime: str) -> float | None:
        return by[arm, regime].step_ms if (arm, regime) in by else None

    result = []
    for row in rows:
        if row.regime == "varying":
            over_fixed = ratio(row.step_ms, time(row.arm, "fixed"))
            row = replace(row, varying_over_fixed=over_fixed)
        if row.arm.startswith("sparse"):
            thin = by.get(("thin", row.regime))
            row = replace(
                row,
                mask_over_sparse=ratio(time("mask", "any"), row.step_ms),
                dense_over_sparse=ratio(time("dense", "any"), row.step_ms),
                sparse_over_thin=ratio(row.step_ms, time("thin", row.regime)),
                saved_over_thin=ratio(row.saved_bytes, None if thin is None else thin.saved_bytes),
                saved_activations_over_thin=ratio(_activations(row), _activations(thin)),
            )
        result.append(row)
    return result


def build_arms(
    problem: Problem,
    structure: Structure,
    arms: Sequence[str],
    regimes: Sequence[str],
    kinds: Mapping[str, type[Any]] = ARMS,
) -> Iterator[TrainingArm]:
    """Yield the arms by name, dense and mask once, the others for each regime.

    Args:
        kinds: the class of each name.
    """

    def stream_of(regime: str, seed: int) -> SetStream:
        seed += problem.seed
        return SetStream(structure, problem.density, regime == "varying", seed, problem.grid)

    streams = {r: stream_of(r, 20 + i) for i, r in enumerate(REGIMES) if r in regimes}
    for name in arms:
        if name == "dense":
            yield kinds[name](problem, structure, streams[regimes[0]])
        elif name == "mask":  # sets of its own: it must not move the widths of the others
            yield kinds[name](problem, structure, stream_of("fixed", 30))
        else:
            for stream in streams.values():
                yield kinds[name](problem, structure, stream)


def gate_sets(structure: Structure, problem: Problem, regimes: Sequence[str]) -> list[Sets]:
    """Draw sets for each regime; two at least, so that a set changes between optimizer steps."""
    seed = problem.seed + 10  # the timed steps must not meet these widths again
    streams = [
        SetStream(structure, problem.density, regime == "varying", seed + i, problem.grid)
        for i, regime in enumerate(regimes)
    ]
    sets: list[Sets] = [stream.fresh() for stream in streams]
    return sets if len(sets) > 1 else [*sets, streams[0].fresh()]


def step_row(
    environment: Environment,
    problem: Problem,
    structure: Structure,
    arm: TrainingArm,
    timing: Timing,
) -> StepRow:
    """Return the row of one arm, without ratios."""
    return StepRow(
        **asdict(environment),
        device=problem.device,
        layout=problem.layout,
        dtype=problem.dtype,
        batch=problem.batch,
        model=problem.label,
        density=problem.density,
        regime=arm.regime,
        arm=arm.name,
        groups=len(arm.widths),
        off_grid=sum(width % 8 != 0 for width in arm.widths.values()),
        rounds=len(timing.steps),
        step_ms=timing.median,
        step_p20_ms=timing.percentile(20),
        step_p80_ms=timing.percentile(80),
        step_p99_ms=timing.percentile(99),
        **{f"{phase}_ms": timing.phase(phase) for phase in PHASES},
        macs=arm.macs(),
        saved_bytes=arm.saved_bytes(),
        saved_weight_bytes=arm.saved_weight_bytes(),
    )


def _activations(row: StepRow | None) -> int | None:
    return None if row is None else row.saved_bytes - row.saved_weight_bytes


def _problems(options: argparse.Namespace) -> Iterator[Problem]:
    for model, residual, layout, density in itertools.product(
        options.models, options.residual, options.layouts, options.densities
    ):
        yield Problem(model, options.batch, density, layout, options.width, residual)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__)
    add = parser.add_argument
    add("--models", type=_list, default="vgg19", help="ours or torchvision's, default vgg19")
    add("--residual", type=_names(POLICIES), default="keep", help="keep, tie, union; default keep")
    add("--width", type=float, default=1.0, help="factor on its channels, default 1")
    add("--batch", type=int, default=32, help="images a step, default 32")
    add("--densities", type=_densities, default=DENSITIES, help=f"default {DENSITIES}")
    add("--layouts", type=_names(LAYOUTS), default="NCHW,NHWC", help="default NCHW,NHWC")
    add("--regimes", type=_names(REGIMES), default="fixed,varying", help="default fixed,varying")
    add("--arms", type=_names(ARMS), default=",".join(ARMS), help=f"default {','.join(ARMS)}")
    add("--rounds", type=int, default=20, help="interleaved rounds, default 20")
    add("--warmup", type=int, default=3, help="rounds before them, default 3")
    add("--lead-in", type=int, default=1, help="untimed steps before each timed one, default 1")
    add("--threads", type=int, default=0, help="default: as torch chooses")
    add("--append", action="store_true", help="add to the rows of an earlier run")
    out = Path("benchmarks/results/train_step_cpu.csv")
    add("--out", type=Path, default=out, help=f"default {out}; the plot goes next to it")
    return parser


def _list(text: str) -> list[str]:
    return text.split(",")


def _densities(text: str) -> list[float]:
    values = [float(part) for part in text.split(",")]
    if not all(0 < value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"expected densities in (0, 1], got {text}")
    return values


def _names(allowed: Sequence[str] | dict[str, object]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in allowed]
        if unknown or len(set(names)) != len(names):
            raise argparse.ArgumentTypeError(f"expected some of {list(allowed)}, got {text}")
        return names

    return parse


if __name__ == "__main__":
    main()
