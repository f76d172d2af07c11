"""Learning-rate schedules: pure functions of the epoch, so that a resumed run needs no state."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

__all__ = ["Schedule", "constant", "multi_step", "step_decay"]

Schedule = Callable[[int, int], float]
"""``schedule(epoch, epochs)``: factor on the learning rate in 0-based ``epoch`` of ``epochs``."""


def constant(epoch: int, epochs: int) -> float:
    """Return 1: the learning rate never changes."""
    return 1.0


def step_decay(epoch: int, epochs: int) -> float:
    """Return the papers' factor: 1, then 1/10 from 50 % of the epochs on, 1/100 from 75 %.

    Args:
        epoch: 0-based epoch.
        epochs: number of epochs of the whole schedule.

    References:
        Spasov and Lio, "Dynamic Neural Network Channel Execution for Efficient Training",
        section 3.3. https://arxiv.org/abs/1905.06435
    """
    if 4 * epoch >= 3 * epochs:
        return 0.01
    return 0.1 if 2 * epoch >= epochs else 1.0


def multi_step(milestones: Sequence[int]) -> Schedule:
    """Return a schedule that divides by 10 at the start of each of these 0-based epochs."""
    ordered = sorted(milestones)

    def schedule(epoch: int, epochs: int) -> float:
        return 10.0 ** -bisect_right(ordered, epoch)

    return schedule
