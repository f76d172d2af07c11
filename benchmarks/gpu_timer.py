"""Interleaved timing of operators on a GPU, and of steps; a host clock stands in for dry runs.

An operator is timed between two events. Before the first one the L2 cache is overwritten and the
device is kept busy for a while, so that the host has issued everything before the device begins:
what is measured is the device's time, with cold caches and without gaps.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks.harness import (
    Arm,
    PhaseClock,
    Timing,
    cudnn_flags,
    environment_set,
    order_of_round,
)

__all__ = ["CudaTimer", "HostTimer", "Samples", "StepTiming", "Timer"]

Call = Callable[[], object]
_MIN_FLUSH = 256 << 20
_HEAD_START = 400_000  # cycles: 0.2 ms at 2 GHz
_OVERLAPPED_MS = 40.0  # a shorter step is issued while the step before it still runs


@dataclass
class Samples:
    """Microseconds of one arm: of the device, and of the host until the call returned."""

    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    def percentile(self, percent: float) -> float:
        """Return a percentile of the device's time, interpolated."""
        return float(np.percentile(self.device, percent))

    @property
    def median(self) -> float:
        """Median of the device's time."""
        return self.percentile(50)


class StepTiming(Timing):
    """Milliseconds of steps: phases are those of the host, steps those of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.elapsed: list[float] = []
        self.host: list[float] = []

    @property
    def steps(self) -> list[float]:
        """Milliseconds of each whole step."""
        return self.elapsed


class Timer(Protocol):
    """Times operators and steps on one device."""

    def time(self, calls: Sequence[Call], rounds: int, warmup: int) -> list[Samples]:
        """Time each call once a round, in an order that changes every round.

        A call may have an attribute ``prepare``, a function that is called before it, untimed.
        """

    def steps(self, arms: Sequence[Arm], rounds: int, warmup: int) -> list[StepTiming]:
        """Time a step of each arm once a round."""

    def synchronize(self) -> None:
        """Wait for the device."""


class HostTimer:
    """For dry runs: the host's clock, no caches flushed."""

    def time(self, calls: Sequence[Call], rounds: int, warmup: int) -> list[Samples]:
        """See `Timer`."""
        return _interleave(calls, rounds, warmup, self._once)

    def steps(self, arms: Sequence[Arm], rounds: int, warmup: int) -> list[StepTiming]:
        """See `Timer`."""
        return _interleave_steps(arms, rounds, warmup, self._step)

    def synchronize(self) -> None:
        """See `Timer`."""

    def _once(self, call: Call) -> tuple[float, float]:
        started = time.perf_counter_ns()
        call()
        elapsed = (time.perf_counter_ns() - started) / 1e3
        return elapsed, elapsed

    def _step(self, arm: Arm, overlapped: bool) -> tuple[PhaseClock, float, float]:
        for _ in range(1 + overlapped):  # as on a GPU: what is prepared is run
            arm.prepare()
        for _ in range(1 + overlapped):
            clock = PhaseClock()
            arm.step(clock)
        whole = sum(clock.ns.values()) / 1e6
        return clock, whole, whole


class CudaTimer:
    """CUDA events, a cold L2 cache for operators, a device that is kept busy."""

    def __init__(self) -> None:
        properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
        size = max(_MIN_FLUSH, 4 * int(getattr(properties, "L2_cache_size", 0)))
        self._flushed = torch.empty(size // 4, dtype=torch.int32, device="cuda")

    def time(self, calls: Sequence[Call], rounds: int, warmup: int) -> list[Samples]:
        """See `Timer`."""
        return _interleave(calls, rounds, warmup, self._once)

    def steps(self, arms: Sequence[Arm], rounds: int, warmup: int) -> list[StepTiming]:
        """See `Timer`."""
        return _interleave_steps(arms, rounds, warmup, self._step)

    def synchronize(self) -> None:
        """See `Timer`."""
        torch.cuda.synchronize()

    def _once(self, call: Call) -> tuple[float, float]:
        start, end = _events()
        torch.cuda.synchronize()
        self._flushed.zero_()
        torch.cuda._sleep(_HEAD_START)
        start.record()
        began = time.perf_counter_ns()
        result = call()
        host = (time.perf_counter_ns() - began) / 1e3
        end.record()
        end.synchronize()
        del result  # not before: memory that is freed may be given to the next kernel
        return 1e3 * start.elapsed_time(end), host

    def _step(self, arm: Arm, overlapped: bool) -> tuple[PhaseClock, float, float]:
        """Time one step; a short one behind another, as in a training loop that never waits."""
        for _ in range(1 + overlapped):
            arm.prepare()
        start, end = _events()
        torch.cuda.synchronize()
        lead, clock = PhaseClock(), PhaseClock()
        if overlapped:
            arm.step(lead)
        start.record()
        arm.step(clock)
        end.record()
        end.synchronize()
        # the host never waits for the device in the step that it issues first
        first = lead if overlapped else clock
        return clock, start.elapsed_time(end), sum(first.ns.values()) / 1e6


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    # the stubs do not know the argument
    start: Any = torch.cuda.Event(enable_timing=True)
    end: Any = torch.cuda.Event(enable_timing=True)
    return start, end


def _interleave(
    calls: Sequence[Call], rounds: int, warmup: int, once: Callable[[Call], tuple[float, float]]
) -> list[Samples]:
    found = [Samples() for _ in calls]
    for number in range(-warmup, rounds):
        for index in order_of_round(len(calls), number):
            getattr(calls[index], "prepare", _nothing)()
            device, host = once(calls[index])
            if number >= 0:
                found[index].device.append(device)
                found[index].host.append(host)
    return found


def _interleave_steps(
    arms: Sequence[Arm],
    rounds: int,
    warmup: int,
    once: Callable[[Arm, bool], tuple[PhaseClock, float, float]],
) -> list[StepTiming]:
    timings = [StepTiming() for _ in arms]
    short = [False] * len(arms)
    with _frozen_garbage():
        for number in range(-warmup, rounds):
            gc.collect()
            for index in order_of_round(len(arms), number):
                arm = arms[index]
                # cuDNN tunes itself where shapes stay: for new ones it takes seconds
                tuned = cudnn_flags(benchmark=arm.regime != "varying")
                with tuned, environment_set(getattr(arm, "settings", {})):
                    clock, elapsed, host = once(arms[index], short[index])
                if number < 0:
                    short[index] = elapsed < _OVERLAPPED_MS
                else:
                    timings[index].add(clock)
                    timings[index].elapsed.append(elapsed)
                    timings[index].host.append(host)
    return timings


def _nothing() -> None:
    """Prepare a call that needs nothing."""


@contextmanager
def _frozen_garbage() -> Iterator[None]:
    """Set all objects of now apart, so that collecting the garbage of a round is quick."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
