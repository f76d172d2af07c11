"""Grouped convolutions: which groups exist when only some channels do."""

from __future__ import annotations

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.errors import expected

__all__ = ["ONE_EACH", "active_groups"]

# for a count of groups: as many as the compact input has channels. A number would differ from set
# to set, and torch.compile would compile anew for each
ONE_EACH = 0


def active_groups(groups: int, in_active: ChannelSet | None, out_active: ChannelSet | None) -> int:
    """Count the groups of a convolution that exist for the given sets.

    A group exists when it has active channels on both sides; the existing ones must have equal
    counts, since a dense grouped convolution computes them. Depthwise: equal sets on both sides.

    Raises:
        ValueError: on unequal counts, or a group that is active on one side only.
    """
    if groups == 1:
        return 1
    if in_active is not None and in_active is out_active and in_active.num_channels == groups:
        return len(in_active)
    inputs, outputs = _counts(groups, in_active), _counts(groups, out_active)
    existing = groups
    for name, counts, other in (("in", inputs, outputs), ("out", outputs, inputs)):
        if counts is None:
            continue
        alive = [g for g, count in enumerate(counts) if count]
        if len({counts[g] for g in alive}) > 1:
            what = f"equal active {name} channels in each of {groups} groups"
            raise ValueError(expected(what, list(counts)))
        partner = other if other is not None else (1,) * groups
        if any(bool(a) != bool(b) for a, b in zip(counts, partner, strict=True)):
            what = f"groups active on both sides or on none ({groups} groups)"
            got = f"in {inputs or 'all'}, out {outputs or 'all'}"
            raise ValueError(expected(what, got))
        existing = len(alive)
    return existing


def _counts(groups: int, active: ChannelSet | None) -> tuple[int, ...] | None:
    if active is None or active.is_full:
        return None
    return active.counts_per_group(groups)
