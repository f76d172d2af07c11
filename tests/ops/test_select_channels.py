"""The operator of the global top-k: what it refuses, passes on and promises to the compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dcx_kernels.kernels import backend
from dcx_kernels.kernels.reference import selection
from dcx_kernels.ops.select_channels import select_channels
from tolerances import assert_exact

SCORES = torch.tensor([0.5, 2.0, 2.0, 1.0, -1.0, 3.0])


def test_select_channels_by_hand() -> None:
    indices, inverse, counts = select_channels(SCORES, [4, 2], 3)
    assert_exact(indices, torch.tensor([1, 2, -1, -1, 1, -1]))
    assert_exact(inverse, torch.tensor([-1, 0, 1, -1, -1, 0]))
    assert_exact(counts, torch.tensor([2, 1]))
    assert_exact(select_channels(SCORES, (4, 2), 4, min_active=2)[2], torch.tensor([2, 2]))


def test_select_channels_asks_for_the_backend_of_the_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, calls = [], []

    class Backend:
        @staticmethod
        def select_channels(*args: Any) -> tuple[torch.Tensor, ...]:
            calls.append(args[1:])
            return selection.select_channels(*args)

    monkeypatch.setattr(backend, "choose", lambda device: asked.append(device) or Backend)
    select_channels(SCORES, [4, 2], 5, 2)
    assert asked == [SCORES.device] and calls == [([4, 2], 5, 2)]


def test_select_channels_of_scores_with_a_gradient_has_none() -> None:
    for result in select_channels(SCORES.clone().requires_grad_(), [6], 3):
        assert not result.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("sizes", "budget", "min_active"), [([4, 2], 3, 1), ([1, 5], 6, 3), ([6], 1, 1)], ids=str
)
def test_select_channels_passes_opcheck(
    sizes: list[int], budget: int, min_active: int, dtype: torch.dtype
) -> None:
    op = torch.ops.dcx_kernels.select_channels.default
    torch.library.opcheck(op, (SCORES.to(dtype), sizes, budget, min_active))


def test_select_channels_compiles_into_one_graph() -> None:
    compiled = torch.compile(select_channels, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(
        compiled(SCORES, [4, 2], 3), select_channels(SCORES, [4, 2], 3), strict=True
    ):
        assert_exact(got, wanted)


@pytest.mark.parametrize(
    ("scores", "sizes", "budget", "min_active", "message"),
    [
        (SCORES.view(2, 3), [6], 3, 1, r"1-D floating scores, got torch.float32 of shape \(2, 3\)"),
        (SCORES.long(), [6], 3, 1, r"1-D floating scores, got torch.int64 of shape \(6,\)"),
        (SCORES, [4, 3], 3, 1, "sizes that add up to 6 scores, got 7"),
        (SCORES, [], 3, 1, r"at least one group, each at least 1, got \[\]"),
        (SCORES, [6, 0], 3, 1, r"each at least 1, got \[6, 0\]"),
        (SCORES, [7, -1], 3, 1, r"each at least 1, got \[7, -1\]"),
        (SCORES, [4, 2], 3, 0, "min_active to be an int of at least 1, got 0"),
        (SCORES, [4, 2], 3, True, "min_active to be an int of at least 1, got True"),
        (SCORES, [4, 2], 3, 1.5, "min_active to be an int of at least 1, got 1.5"),
        (SCORES, [4, 2], 1, 1, r"a budget of 2 \(min_active=1 in 2 groups\) to 6 channels, got 1"),
        (SCORES, [4, 2], 4, 3, r"a budget of 5 \(min_active=3 in 2 groups\) to 6 channels, got 4"),
        (SCORES, [4, 2], 7, 1, "to 6 channels, got 7"),
    ],
    ids=[
        "2-D", "integers", "sum", "no-groups", "empty-group", "negative", "floor-0", "floor-bool",
        "floor-float", "budget-low", "budget-below-floors", "budget-high",
    ],
)  # fmt: skip
def test_select_channels_names_what_is_wrong(
    scores: torch.Tensor, sizes: list[int], budget: int, min_active: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        select_channels(scores, sizes, budget, min_active)
