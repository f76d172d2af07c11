"""README quotes the committed results, and every study has what it takes to be checked."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
TABLES = sorted(RESULTS.glob("*/table.md"))
_MEASURED = re.compile(r"\d+\.\d+ \u00b1\d+\.\d+")


def _section() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.partition("## What the papers print, and ours\n")[2].partition("\n## ")[0]


def test_readme_quotes_the_tables() -> None:
    quoted = _MEASURED.findall(_section())
    tables = " ".join(path.read_text(encoding="utf-8") for path in TABLES)
    assert len(quoted) >= 12
    assert [number for number in quoted if number not in tables] == []


def test_readme_links_every_table() -> None:
    linked = set(re.findall(r"\(results/([\w-]+)/table\.md\)", _section()))
    assert linked == {path.parent.name for path in TABLES}


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.parent.name)
def test_every_run_says_how_it_was_made(table: Path) -> None:
    with (table.parent / "runs.csv").open(newline="", encoding="utf-8") as file:
        runs = list(csv.DictReader(file))
    rows = (RESULTS / "results.jsonl").read_text(encoding="utf-8").splitlines()
    known = {row["run"]: row for row in map(json.loads, rows)}
    assert len({run["seed"] for run in runs}) >= 2
    for run in runs:
        row = known[run["run"]]
        assert float(run["accuracy"]) == row["accuracy"]
        assert re.fullmatch(r"[0-9a-f]{12}", row["commit"])  # of a tree without changes
        for name in ("config", "machine", "torch", "wall_s", "settings", "images"):
            assert row[name], name
        assert "/" not in row["source"]
    assert (table.parent / "figure.png").read_bytes().startswith(b"\x89PNG")
