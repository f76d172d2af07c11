"""Interleaved timing: every arm takes one turn a round, in an order that changes every round.

Whatever happens to the machine meanwhile happens to all arms, so that ratios within one run hold.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

__all__ = [
    "PHASES", "Arm", "PhaseClock", "Timing", "cudnn_flags", "environment_set", "measure",
    "order_of_round", "ratio",
]  # fmt: skip

PHASES = ("set_active", "zero_grad", "forward", "backward", "saliency", "optimizer")


class PhaseClock:
    """Splits a step into phases without a gap: what lies between two laps belongs to the later."""

    def __init__(self) -> None:
        self.ns: dict[str, int] = {}
        self._last = 0

    def start(self) -> None:
        """Begin the step."""
        self._last = time.perf_counter_ns()

    def lap(self, phase: str) -> None:
        """End a phase."""
        now = time.perf_counter_ns()
        self.ns[phase] = self.ns.get(phase, 0) + now - self._last
        self._last = now


class Arm(Protocol):
    """One way to run a training step."""

    name: str
    regime: str
    needs_lead_in: bool

    def prepare(self) -> None:
        """Make the inputs of the next step. Not timed."""

    def step(self, clock: PhaseClock) -> None:
        """Run one step between ``clock.start()`` and the last ``clock.lap()``."""


@dataclass
class Timing:
    """What was measured of one arm: the milliseconds of each phase, one list entry a round."""

    phases: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PHASES})

    def add(self, clock: PhaseClock) -> None:
        """Append one step.

        Raises:
            ValueError: on a phase that is not in `PHASES`: it would be lost.
        """
        unknown = clock.ns.keys() - set(PHASES)
        if unknown:
            raise ValueError(f"expected phases among {PHASES}, got {sorted(unknown)}")
        for phase in PHASES:
            self.phases[phase].append(clock.ns.get(phase, 0) / 1e6)

    @property
    def steps(self) -> list[float]:
        """Milliseconds of each whole step."""
        return [sum(parts) for parts in zip(*self.phases.values(), strict=True)]

    def percentile(self, percent: float) -> float:
        """Return a percentile of the whole step, interpolated."""
        return float(np.percentile(self.steps, percent))

    @property
    def median(self) -> float:
        """Median of the whole step."""
        return self.percentile(50)

    def phase(self, name: str) -> float:
        """Median of one phase."""
        return float(np.median(self.phases[name]))


def measure(arms: Sequence[Arm], rounds: int, warmup: int, lead_in: int) -> list[Timing]:
    """Time every arm once a round.

    Args:
        arms: what to compare.
        rounds: rounds that count.
        warmup: rounds before that do not.
        lead_in: untimed steps at the beginning of every turn, so that an arm finds its own data in
            the caches, as in a training run, and not those of the arm before; only for arms that
            say they need it.

    Returns:
        One timing an arm, in order.
    """
    timings = [Timing() for _ in arms]
    for number in range(-warmup, rounds):
        with _no_garbage_collection():
            for index in order_of_round(len(arms), number):
                clock = PhaseClock()
                for _ in range(1 + lead_in * arms[index].needs_lead_in):
                    arms[index].prepare()
                    clock = PhaseClock()
                    arms[index].step(clock)
                if number >= 0:
                    timings[index].add(clock)
    return timings


def order_of_round(count: int, number: int) -> list[int]:
    """Rotate the order every round, and reverse it after each full turn: neighbours change too."""
    start = number % count
    order = [*range(start, count), *range(start)]
    return order[::-1] if (number // count) % 2 else order


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """Return the quotient, or None if one of them was not measured."""
    return None if numerator is None or denominator is None else numerator / denominator


@contextmanager
def cudnn_flags(benchmark: bool, allow_tf32: bool | None = None) -> Iterator[None]:
    """Set flags of cuDNN for a while; ``allow_tf32`` None leaves that as it is.

    A library may forbid to set them for good, as torch's own test helpers do.
    """
    flags = torch.backends.cudnn
    tf32 = flags.allow_tf32 if allow_tf32 is None else allow_tf32
    settings = {"enabled": flags.enabled, "benchmark": benchmark, "benchmark_limit": None}
    settings |= {"deterministic": flags.deterministic, "allow_tf32": tf32}
    with flags.flags(**settings):
        yield


@contextmanager
def environment_set(settings: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect now, then not until the end."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
