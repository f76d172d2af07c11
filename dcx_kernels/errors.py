"""Errors users can meet, and the one form their messages have: "expected <what>, got <value>"."""

from __future__ import annotations

__all__ = ["CheckpointError", "DataError", "NonFiniteError", "expected"]


class CheckpointError(RuntimeError):
    """A checkpoint or thin model on disk is missing, truncated, corrupt or of another model."""


class DataError(ValueError):
    """A data set path or file does not hold what its format promises."""


class NonFiniteError(ArithmeticError):
    """A loss or a saliency is NaN or infinite; the state before it was kept."""


def expected(what: str, got: object, where: str | None = None) -> str:
    """Format an error message.

    Args:
        what: the condition that was violated, as a noun phrase.
        got: the offending value.
        where: layer, group or argument the condition belongs to.
    """
    prefix = f"{where}: " if where else ""
    return f"{prefix}expected {what}, got {got}"
