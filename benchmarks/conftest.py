"""Options and fixtures of the operator benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.environment import Environment, current_environment
from benchmarks.rows import OpRow, RowWriter


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --ops-csv."""
    parser.addoption("--ops-csv", type=Path, default=None, help="write a row per operator here")


@pytest.fixture(scope="session")
def environment() -> Environment:
    """The key of every row."""
    return current_environment()


@pytest.fixture(scope="session")
def op_writer(request: pytest.FixtureRequest) -> Iterator[RowWriter[OpRow] | None]:
    """The results file, or None if none was asked for."""
    path: Path | None = request.config.getoption("--ops-csv")
    if path is None:
        yield None
        return
    with RowWriter(path, OpRow) as writer:
        yield writer
