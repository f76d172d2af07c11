"""Widths change every step, and nothing may compile anew: variants are counted over random widths.

The real launchers are called in a process of its own, in which nothing is compiled or run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dcx_kernels.kernels.tiles import DISTINCT

WIDTHS = 1000
OFFLINE = Path(__file__).with_name("offline.py")

_CONV, _WGRAD = len(DISTINCT["conv", 2]), len(DISTINCT["wgrad", 2])
BOUNDS = {
    # the weight is full or packed; layouts: NCHW, or NHWC with channels of source and destination
    # that are multiples of 16 bytes or not, where a tile may be fitted to loads of single elements
    "fwd": {"channel_conv2d_kernel": _CONV * 2 * (1 + 4)},
    "dgrad": {"channel_conv2d_kernel": _CONV * 2 * (1 + 4)},
    # k and c allow loads of 16, of 4 bytes or of neither; the gradient is written at once, or as
    # partial sums in float32; depthwise filters of one tile, one or several for a channel
    "wgrad": {"_conv_wgrad_kernel": 2 * (_WGRAD * 3 * 3 + 3 * 3 + 3), "_sum_wgrad_kernel": 1},
    # rows or planes, whole vectors or not
    "batch norm fwd": {
        "_moments_kernel": 4,
        "_finish_kernel": 1,
        "_running_kernel": 1,
        "_norm_act_fwd_kernel": 4,
    },
    # sums per sample or per batch
    "batch norm bwd": {
        "_norm_act_bwd_kernel": 4,
        "_norm_grad_kernel": 4,
        "_finish_bwd_kernel": 2,
        "_sum_partials_kernel": 2,
    },
    "union": {"_assemble_kernel": 4, "_places_kernel": 1},
    "slices": {"_move_slices_kernel": 2},
    "sgd": {"_sgd_slices_kernel": 1},
    "adamw": {"_adamw_slices_kernel": 1},
}


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return the flags of every variant of every kernel of every operator."""
    path = tmp_path_factory.mktemp("variants") / "variants.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(OFFLINE), "--variants", str(WIDTHS), "--json", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, list[dict[str, Any]]]] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize("operator", BOUNDS)
def test_variants_do_not_grow_with_the_widths_that_were_met(
    operator: str, counted: dict[str, dict[str, list[dict[str, Any]]]]
) -> None:
    numbers = {kernel: len(variants) for kernel, variants in counted[operator].items()}
    assert set(numbers) <= set(BOUNDS[operator]), "a kernel without a bound"
    for kernel, bound in BOUNDS[operator].items():
        assert 1 <= numbers[kernel] <= bound, (kernel, numbers[kernel], _differing(counted, kernel))


def test_every_operator_has_a_bound(
    counted: dict[str, dict[str, list[dict[str, Any]]]],
) -> None:
    assert set(counted) == set(BOUNDS)


def _differing(
    counted: dict[str, dict[str, list[dict[str, Any]]]], kernel: str
) -> dict[str, list[str]]:
    """Return the flags that differ among the variants of a kernel, with their values."""
    variants = [one for kernels in counted.values() for one in kernels.get(kernel, [])]
    values = {flag: {str(one.get(flag)) for one in variants} for flag in variants[0]}
    return {flag: sorted(found) for flag, found in values.items() if len(found) > 1}
