"""The pages of docs/ are true: their python runs, in order, and their commands parse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dcx_kernels.cli.parser import build_parser

DOCS = Path(__file__).resolve().parent.parent / "docs"
TUTORIAL = DOCS / "tutorial.md"
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHORT = 30
"""Lines, empty ones not counted, that the tutorial promises for each of its two programs."""


def _blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Return line number and source of each block."""
    text = page.read_text(encoding="utf-8")
    found = [m for m in _BLOCK.finditer(text) if m.group(1) == language]
    assert len(found) == text.count(f"```{language}\n"), f"a block of {page.name} is not closed"
    return [(text.count("\n", 0, m.start(2)), m.group(2)) for m in found]


def _write_photos(folder: Path) -> None:
    """Write 128 + 16 images of two classes: reddish and bluish noise."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for part, count in (("train", 64), ("val", 8)):
        for label, name in enumerate(("cat", "dog")):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                image = generator.integers(0, 120, (40, 36, 3))
                image[:, :, 2 * label] += 100
                path = folder / part / name / f"{number:04}.png"
                Image.fromarray(image.astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def namespace(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the tutorial beside a folder of photos; return the names it leaves."""
    pytest.importorskip("torchvision")
    folder = tmp_path_factory.mktemp("tutorial")
    _write_photos(folder / "photos")
    names: dict[str, Any] = {"__name__": "tutorial"}
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=()):
        patch.chdir(folder)
        torch.manual_seed(0)
        for line, source in _blocks(TUTORIAL, "python"):
            # padded with newlines, so that a traceback names the page's own line
            exec(compile("\n" * line + source, str(TUTORIAL), "exec"), names)
    return names


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Of every test here."""


def test_tutorial_leaves_a_thin_network_that_has_learnt(namespace: dict[str, Any]) -> None:
    thin, test = namespace["thin"], namespace["test"]
    assert sum(namespace["widths"]) == 64  # 40 % of 160 channels
    assert namespace["sizes"][0] < 0.5 * namespace["sizes"][1]
    assert namespace["evaluate"](thin, test).accuracy > 0.8


def test_policy_of_the_tutorial_explores_learns_and_resumes(namespace: dict[str, Any]) -> None:
    """Three channels of ten: the best two are found and kept; a copy goes on alike."""
    policy = namespace["EpsilonGreedy"]
    selector, copy = (policy({"a": 10}, density=0.3) for _ in range(2))
    values = torch.tensor([0.1, 0.2, 0.1, 0.2, 0.1, 1.0, 0.1, 0.8, 0.1, 0.2])
    seen: set[int] = set()
    for step in range(80):
        sets = selector.select()
        assert sets == selector.select() and len(sets["a"]) == 3
        seen |= set(sets["a"].indices.tolist())
        shown = {"a": values[sets["a"].indices]}
        selector.update(shown)
        if step == 40:
            copy.load_state_dict(selector.state_dict())
        elif step > 40:
            assert copy.select() == sets
            copy.update(shown)
    assert seen == set(range(10))
    assert {5, 7} <= set(selector.final()["a"].indices.tolist())


def test_programs_of_the_tutorial_are_as_short_as_it_says() -> None:
    programs = [source for _, source in _blocks(TUTORIAL, "python")]
    lengths = [len([line for line in source.splitlines() if line.strip()]) for source in programs]
    assert lengths[0] <= SHORT and lengths[2] <= SHORT, lengths
    for source in programs:
        assert max(map(len, source.splitlines())) <= 100


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    parser = build_parser()
    commands = [
        line
        for _, source in _blocks(page, "bash")
        for line in source.replace("\\\n", " ").splitlines()
        if line.startswith("dcx ")
    ]
    for command in commands:
        parser.parse_args(shlex.split(command, comments=True)[1:])
    if page == TUTORIAL:
        assert commands
