"""Feature boosting and suppression on the CPU: latency of one image, throughput of a batch.

M-CifarNet with half of the channels of each sample computed (about a quarter of the
multiply-accumulates) beside the dense network and the masked one, interleaved in one run.
Run: ``python -m benchmarks.fbs_latency [--threads 2] [--out benchmarks/results/fbs_latency.csv]``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import dcx_kernels as dcx
from benchmarks.environment import Environment, current_environment
from benchmarks.rows import RowWriter
from dcx_kernels.models import m_cifarnet

__all__ = ["FbsRow", "main", "measure", "networks"]

_TOLERANCE = 1e-3  # a gate against nonsense; the tests compare properly, in float64
_CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}


@dataclass(frozen=True)
class FbsRow(Environment):
    """One network at one batch size; times are of one forward, in ms.

    Args:
        clock: "wall", or "cpu": this thread's own time, for a busy machine (one thread only).
        dense_over_this: ratio of medians, of rounds that were interleaved.
    """

    model: str
    dtype: str
    density: float
    arm: str
    batch: int
    clock: str
    rounds: int
    median_ms: float
    p20_ms: float
    p99_ms: float
    images_per_s: float
    dense_over_this: float


def networks(density: float, width: float = 1.0) -> dict[str, nn.Module]:
    """Build the dense network, and one with gates that skips or masks, all in evaluation mode."""
    torch.manual_seed(0)
    dense = m_cifarnet(width=width)
    gated = dcx.convert_fbs(dense, density=density)
    with torch.no_grad():  # statistics that fit, as after training; else activations explode
        for layer in gated.gated.values():
            layer.norm.momentum = None
        for _ in range(4):
            gated.train()(torch.randn(16, 3, 32, 32))
    gated.eval()
    masked = dcx.convert_fbs(dense, density=density, execution="mask").eval()
    masked.load_state_dict(gated.state_dict())
    return {"dense": dense.eval(), "mask": masked, "sparse": gated}


@torch.inference_mode()
def measure(
    arms: dict[str, nn.Module], images: Tensor, rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return times in ms of every arm, sorted.

    Raises:
        AssertionError: if skipping and masking disagree.
    """
    wanted, found = arms["mask"](images), arms["sparse"](images)
    error = float((found - wanted).norm() / wanted.norm())
    assert error < _TOLERANCE, f"relative error {error:.1e}"
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(2 + rounds):
        for name, network in arms.items():
            start = clock()
            network(images)
            times[name].append((clock() - start) * 1e3)
    return {name: sorted(kept[2:]) for name, kept in times.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table; with ``--out`` add its rows to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40, help="of one image; a batch has fewer")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--clock", choices=_CLOCKS, default="wall")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    if options.clock == "cpu" and options.threads != 1:
        parser.error("expected --threads 1 with --clock cpu: it is the time of one thread")
    torch.set_num_threads(options.threads)
    rows = []
    arms = networks(options.density, options.width)
    for batch in options.batches:
        rounds = options.rounds if batch == 1 else max(20, options.rounds // 4)
        images = torch.randn(batch, 3, 32, 32)
        times = measure(arms, images, rounds, _CLOCKS[options.clock])
        dense = statistics.median(times["dense"])
        for arm, sorted_ms in times.items():
            median = statistics.median(sorted_ms)
            rows.append(
                FbsRow(
                    **asdict(current_environment()),
                    model="m_cifarnet" if options.width == 1 else f"m_cifarnet x{options.width:g}",
                    dtype="float32",
                    density=1.0 if arm == "dense" else options.density,
                    arm=arm,
                    batch=batch,
                    clock=options.clock,
                    rounds=rounds,
                    median_ms=median,
                    p20_ms=sorted_ms[len(sorted_ms) // 5],
                    p99_ms=sorted_ms[-1 - len(sorted_ms) // 100],
                    images_per_s=1e3 * batch / median,
                    dense_over_this=dense / median,
                )
            )
    print(f"float32, {options.threads} threads, {rows[0].cpu}, torch {rows[0].torch}")
    print("batch arm      median ms   p20 ms   p99 ms  images/s  dense/this")
    for row in rows:
        milliseconds = f"{row.median_ms:9.3f} {row.p20_ms:8.3f} {row.p99_ms:8.3f}"
        print(f"{row.batch:5} {row.arm:8} {milliseconds}", end=" ")
        print(f"{row.images_per_s:9.1f} {row.dense_over_this:11.2f}")
    if options.out is not None:
        with RowWriter(options.out, FbsRow) as writer:
            for row in rows:
                writer.write(row)


if __name__ == "__main__":
    main()
