"""Learning rates are those of the paper."""

from __future__ import annotations

import pytest

from dcx_kernels.train.schedule import constant, step_decay


@pytest.mark.parametrize(
    ("epochs", "boundaries"), [(160, (80, 120)), (20, (10, 15)), (8, (4, 6)), (5, (3, 4))]
)
def test_step_decay_at_half_and_three_quarters(epochs: int, boundaries: tuple[int, int]) -> None:
    half, late = boundaries
    wanted = [1.0] * half + [0.1] * (late - half) + [0.01] * (epochs - late)
    assert [step_decay(epoch, epochs) for epoch in range(epochs)] == wanted


def test_constant() -> None:
    assert {constant(epoch, 9) for epoch in range(9)} == {1.0}
