"""Where a training step goes, operator by operator: sparse and thin side by side.

The profiler slows small operators down: read the lines as shares; `benchmarks.train_step` times.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.arms import SparseArm, ThinArm, TrainingArm
from benchmarks.harness import PhaseClock
from benchmarks.problem import LAYOUTS, Problem, SetStream, Structure

__all__ = ["LINES", "line_of", "main", "profile_arm"]

# first match wins: (line, parts of operator names)
LINES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("conv backward", ("convolution_backward",)),
    ("conv forward", ("convolution", "conv2d")),
    ("batch norm backward", ("batch_norm_bwd", "native_batch_norm_backward")),
    ("batch norm forward", ("batch_norm",)),
    ("ReLU", ("relu", "threshold_backward", "clamp_min")),
    ("max pool", ("max_pool",)),
    ("gather", ("index_select", "aten::index", "move_slices")),
    ("scatter", ("index_copy", "index_put")),
    ("SGD update", ("_fused_sgd", "sgd_slices")),
    ("linear, loss, products", ("addmm", "aten::mm", "softmax", "nll_loss", "cross_entropy")),
    ("copies and zeros", ("copy_", "zero_", "fill_", "clone", "aten::empty", "resize")),
)
OTHER = "other operators"
PYTHON = "between operators (Python, autograd)"


def main(argv: Sequence[str] | None = None) -> None:
    """Profile both arms and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accounting", description=__doc__)
    parser.add_argument("--model", default="vgg19", help="ours or torchvision's")
    parser.add_argument("--residual", default="keep", choices=["keep", "tie", "union"])
    parser.add_argument("--width", type=float, default=1.0, help="factor on its channels")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--layout", choices=LAYOUTS, default="NCHW")
    parser.add_argument("--varying", action="store_true", help="new widths every step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=0, help="default: as torch chooses")
    o = parser.parse_args(argv)
    if o.threads:
        torch.set_num_threads(o.threads)
    problem = Problem(o.model, o.batch, o.density, o.layout, o.width, o.residual)
    structure = Structure.of(problem.converted("sparse"))
    stream = SetStream(structure, o.density, o.varying, seed=40)
    sparse = profile_arm(SparseArm(problem, structure, stream), o.steps)
    thin = profile_arm(ThinArm(problem, structure, stream), o.steps)
    Console().print(_table(sparse, thin, f"{problem.label} {o.layout} d={o.density:g}"))


def profile_arm(arm: TrainingArm, steps: int) -> dict[str, float]:
    """Return milliseconds a step by line; they add up to the whole step."""
    for _ in range(2):
        arm.prepare()
        arm.step(PhaseClock())
    spent = dict.fromkeys([*(line for line, _ in LINES), OTHER], 0.0)
    whole = 0.0
    for _ in range(steps):
        arm.prepare()  # outside the profile: it draws sets and builds thin networks
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
            started = time.perf_counter()
            arm.step(PhaseClock())
            whole += 1e3 * (time.perf_counter() - started) / steps
        for event in profiled.key_averages():
            line = line_of(event.key)
            if line is not None:
                spent[line] += event.self_cpu_time_total / 1e3 / steps
    return {**spent, PYTHON: whole - sum(spent.values())}


def line_of(operator: str) -> str | None:
    """Return the line an operator belongs to; None for autograd's wrappers."""
    if "::" not in operator or operator.startswith("autograd::"):
        return None
    for line, parts in LINES:
        if any(part in operator for part in parts):
            return line
    return OTHER


def _table(sparse: Mapping[str, float], thin: Mapping[str, float], title: str) -> Table:
    total = sum(thin.values())
    table = Table(title=f"{title}: ms a step under the profiler")
    table.add_column("")
    for column in ("thin", "sparse", "difference", "% of the thin step"):
        table.add_column(column, justify="right")
    lines = [*sparse, "whole step"]
    both = {**sparse, lines[-1]: sum(sparse.values())}, {**thin, lines[-1]: total}
    for line in lines:
        ours, theirs = both[0][line], both[1][line]
        share = 100 * (ours - theirs) / total
        difference = f"{ours - theirs:+.2f}"
        table.add_row(line, f"{theirs:.2f}", f"{ours:.2f}", difference, f"{share:+.1f}")
    return table


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
