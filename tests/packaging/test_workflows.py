"""The workflows are YAML, and what they call exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

CHECKOUT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((CHECKOUT / ".github/workflows").glob("*.yml"))


def _steps(path: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_steps_call_what_exists(path: Path) -> None:
    makefile = (CHECKOUT / "Makefile").read_text(encoding="utf-8")
    assert _steps(path)
    for step in _steps(path):
        assert ("run" in step) != ("uses" in step), step
        for target in re.findall(r"^make ([a-z-]+)", step.get("run", ""), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
        if step.get("run", "").startswith(".ci/"):
            assert (CHECKOUT / step["run"]).is_file()


def test_every_job_needed_is_there() -> None:
    for path in WORKFLOWS:
        jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
        assert {job["needs"] for job in jobs.values() if "needs" in job} <= set(jobs)


def test_wheels_cover_toolkits_and_processors() -> None:
    path = CHECKOUT / ".github/workflows/wheels.yml"
    matrix = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]["wheel"]["strategy"]["matrix"]
    assert {version.split(".")[0] for version in matrix["cuda"]} == {"12", "13"}
    assert [machine["name"] for machine in matrix["machine"]] == ["x86_64", "aarch64"]
