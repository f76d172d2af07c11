"""How the decay of the utilities changes while a network trains."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from dcx_kernels.errors import expected

__all__ = ["POLICIES", "Policy", "utility_decay"]

Policy = Literal["increase", "divide", "constant"]
POLICIES = ("increase", "divide", "constant")
_RISE = 0.1


def utility_decay(
    policy: Policy, milestones: Sequence[int] = (), first: float = 0.6
) -> dict[int, float]:
    """Return lambda of dynamic channel propagation as it moves at the milestones.

    The paper has it "drop" (III-C), "divided by 10" (IV-A) and "increase" (V-B). Its code for
    ImageNet adds 0.1 at each milestone and sets 1 at the last, which is ``increase``: with
    lambda = 1 utilities of active channels only rise, so that the selection stops.

    Args:
        policy: ``increase``; ``divide`` by 10 at each milestone; or ``constant``.
        milestones: rising steps, as a rule those at which the learning rate falls.
        first: lambda from the start on.

    Returns:
        first step -> lambda from there on; what ``DCP(decay=...)`` takes.

    Raises:
        ValueError: on another policy, or milestones that do not rise from 1 on.

    Example:
        >>> utility_decay("increase", [100, 200])
        {0: 0.6, 100: 0.7, 200: 1.0}
    """
    if policy not in POLICIES:
        raise ValueError(expected(f"a policy out of {POLICIES}", repr(policy), "utility_decay"))
    steps = [0, *milestones]
    if any(a >= b for a, b in pairwise(steps)):
        what = "milestones that rise from 1 on"
        raise ValueError(expected(what, list(milestones), "utility_decay"))
    if policy == "constant":
        return {0: first}
    if policy == "divide":
        return {step: first / 10**passed for passed, step in enumerate(steps)}
    # rounded, as 0.7 + 0.1 is not 0.8
    decay = {step: min(1.0, round(first + _RISE * n, 12)) for n, step in enumerate(steps)}
    return decay | dict.fromkeys(milestones[-1:], 1.0)
