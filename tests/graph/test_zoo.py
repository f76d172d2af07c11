"""Every model converts; of every family, sparse training is masked training."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torchvision

import dcx_kernels as dcx
from zoo import TIMM, TORCHVISION, Case, check, torchvision_names


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Of every test here."""


def _checks(cases: dict[str, Case]) -> list[Any]:
    """Return every (case, residual, grouped) as a parameter; what is not quick is slow."""
    return [
        pytest.param(
            case,
            *policy,
            id="-".join((name, *policy)),
            marks=[] if case.quick and policy[0] == "union" else pytest.mark.slow,
        )
        for name, case in cases.items()
        for policy in case.policies()
    ]


@pytest.mark.parametrize(("case", "residual", "grouped"), _checks(TORCHVISION))
def test_torchvision(case: Case, residual: str, grouped: str) -> None:
    check(case, residual, grouped)


@pytest.mark.parametrize(("case", "residual", "grouped"), _checks(TIMM))
@pytest.mark.filterwarnings("ignore:Overwriting .* in registry:UserWarning")  # of timm, importing
def test_timm(case: Case, residual: str, grouped: str) -> None:
    pytest.importorskip("timm")
    check(case, residual, grouped)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_every_torchvision_model_converts(capsys: pytest.CaptureFixture[str]) -> None:
    """Shapes alone, nothing is computed: also the largest are converted, under every policy."""
    names = torchvision_names()
    segmentation = torchvision.models.list_models(module=torchvision.models.segmentation)
    assert len(names) >= 74
    for name in names:
        options: dict[str, Any] = {"weights_backbone": None} if name in segmentation else {}
        if name in ("googlenet", "inception_v3"):
            options = {"init_weights": False}
        # regnet computes its widths with tensors, which have no values on the meta device
        with torch.device("cpu" if name.startswith("regnet") else "meta"):
            dense = torchvision.models.get_model(name, **options).to("meta")
        image = torch.empty(2, 3, 320, 320, device="meta")
        for residual in ("keep", "tie", "union"):
            model = dcx.convert(dense, image, residual, grouped="equal")
            assert list(model.state_dict()) == list(dense.state_dict())
            assert all(g.selectable or g.reason for g in model.groups.values())
            assert name.startswith("convnext") or any(g.selectable for g in model.groups.values())
    with capsys.disabled():
        sys.stdout.write(
            f"\n{len(names)} models of torchvision convert; trained and compared are "
            f"{len(TORCHVISION)} of torchvision and {len(TIMM)} of timm\n"
        )
