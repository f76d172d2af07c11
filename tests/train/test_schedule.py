"""Learning rates are those of the papers."""

from __future__ import annotations

import pytest

from dcx_kernels.train.schedule import constant, multi_step, step_decay


@pytest.mark.parametrize(
    ("epochs", "boundaries"), [(160, (80, 120)), (20, (10, 15)), (8, (4, 6)), (5, (3, 4))]
)
def test_step_decay_at_half_and_three_quarters(epochs: int, boundaries: tuple[int, int]) -> None:
    half, late = boundaries
    wanted = [1.0] * half + [0.1] * (late - half) + [0.01] * (epochs - late)
    assert [step_decay(epoch, epochs) for epoch in range(epochs)] == wanted


def test_constant() -> None:
    assert {constant(epoch, 9) for epoch in range(9)} == {1.0}


def test_multi_step_divides_at_each_milestone() -> None:
    schedule = multi_step([4, 2])
    assert [schedule(epoch, 6) for epoch in range(6)] == [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    assert [multi_step([0, 9])(epoch, 3) for epoch in range(3)] == [0.1] * 3
    assert multi_step([])(5, 6) == 1.0
