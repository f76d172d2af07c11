"""The import law of the package, the cap on file length, and ASCII, read from the source.

Imports point down only. Those inside functions and under TYPE_CHECKING count as well: a cycle is a
cycle. What a module may import is decided by the first name below the package, its *unit*.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "dcx_kernels"
MAX_LINES = 400

BASE = {"_env", "errors", "typing", "channel_set"}  # may import each other
RANKS = {
    **dict.fromkeys(BASE, 0.0),
    **dict.fromkeys(["models", "data"], 0.5),
    "kernels": 1.0,
    "ops": 2.0,
    **dict.fromkeys(["nn", "optim"], 3.0),
    **dict.fromkeys(["graph", "selectors"], 4.0),
    "train": 5.0,
    "recipes": 5.5,
    **dict.fromkeys(["cli", "__main__"], 6.0),
    "__init__": 7.0,
}
ONLY_BASE = {"selectors", "models", "data"}

# device code is reached through kernels/backend.py, so that a missing backend is one decision
BACKEND = "dcx_kernels/kernels/backend.py"
RESTRICTED = {
    "triton": (BACKEND, "dcx_kernels/kernels/triton/"),
    "dcx_kernels.kernels.triton": (BACKEND, "dcx_kernels/kernels/triton/"),
    "dcx_kernels.kernels.native": (BACKEND, "dcx_kernels/kernels/native/"),
    "_C": (BACKEND, "dcx_kernels/kernels/native/"),
    "_C_cpu": (BACKEND, "dcx_kernels/kernels/native/"),
    "_C_cuda": (BACKEND, "dcx_kernels/kernels/native/"),
}
LOADERS = {"load_library", "load_extension"}
BY_NAME = {"import_module", "__import__", "find_spec"}


def check_imports(path: str, source: str) -> list[str]:
    """Return one line per import of ``source`` that breaks the law.

    Args:
        path: file relative to the repository, with forward slashes.
        source: what stands in it.
    """
    unit = _unit_of_file(path)
    if unit not in RANKS:
        return [f"{path}: {unit!r} has no layer: give it one in RANKS"]
    found = []
    for line, target in _imports(ast.parse(source)):
        problem = _problem(path, unit, target)
        if problem:
            found.append(f"{path}:{line}: {problem}")
    return found


def check_text(path: str, text: str) -> list[str]:
    """Return one line per breach of the length cap or of ASCII."""
    found = []
    lines = text.splitlines()
    if len(lines) > MAX_LINES:
        found.append(f"{path}: {len(lines)} lines, at most {MAX_LINES} are allowed")
    found += [
        f"{path}:{number}: not ASCII: {line.strip()[:60]!r}"
        for number, line in enumerate(lines, 1)
        if not line.isascii()
    ]
    return found


def _unit_of_file(path: str) -> str:
    first = PurePosixPath(path).relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def _imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and dotted target of each import; relative ones as they are written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call):
            function = node.func
            name = getattr(function, "id", None) or getattr(function, "attr", "")
            if name in LOADERS:
                yield node.lineno, "_C"
            first = node.args[0] if node.args else None
            if name in BY_NAME and isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value


def _problem(path: str, unit: str, target: str) -> str | None:
    if target.startswith("."):
        return f"relative import of {target!r}"
    for name, allowed in RESTRICTED.items():
        if _is_in(target, name) or _is_in(target, f"{PACKAGE}.{name}"):
            if not any(path == place or _is_below(path, place) for place in allowed):
                return f"{target!r} may be imported only by {' and '.join(allowed)}"
            return None
    if not _is_in(target, PACKAGE) or target == f"{PACKAGE}.__version__":
        return None
    parts = target.split(".")
    imported = parts[1] if len(parts) > 1 and parts[1] in RANKS else "__init__"
    if imported == "__init__" and len(parts) > 2:
        return f"{target!r} has no layer: give it one in RANKS"
    if imported == unit or (unit in BASE and imported in BASE):
        return None
    if unit in ONLY_BASE and imported not in BASE:
        return f"{unit} may import nothing but {', '.join(sorted(BASE))}, not {target!r}"
    if RANKS[imported] >= RANKS[unit]:
        return f"{unit} may not import {target!r}: imports point down only"
    return None


def _is_in(target: str, name: str) -> bool:
    return target == name or target.startswith(f"{name}.")


def _is_below(path: str, place: str) -> bool:
    return place.endswith("/") and path.startswith(place)


def _files(*folders: str) -> Iterator[tuple[str, str]]:
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")


def test_package_obeys_the_import_law() -> None:
    files = list(_files(PACKAGE))
    assert len(files) > 3, f"no package found under {ROOT}"
    broken = [line for path, source in files for line in check_imports(path, source)]
    assert not broken, "\n".join(broken)


def test_files_are_short_and_ascii() -> None:
    files = list(_files(PACKAGE, "tests", "benchmarks"))
    assert len(files) > 3, f"no files found under {ROOT}"
    broken = [line for path, text in files for line in check_text(path, text)]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("errors.py", "import dcx_kernels.data", "imports point down only"),
        ("models/vgg.py", "from dcx_kernels.data import Loader", "nothing but"),
        ("data/digits.py", "from dcx_kernels import models", "nothing but"),
        ("kernels/reference.py", "from dcx_kernels.ops import gather", "point down"),
        ("ops/conv.py", "from dcx_kernels.nn.conv import X", "point down"),
        ("nn/conv.py", "import dcx_kernels.optim.sgd as s", "point down"),
        ("optim/sgd.py", "from dcx_kernels import nn", "point down"),
        ("graph/convert.py", "from dcx_kernels.selectors import CUCB", "point down"),
        ("selectors/cucb.py", "import dcx_kernels.graph", "nothing but"),
        ("selectors/cucb.py", "from dcx_kernels.ops import channel_conv2d", "nothing but"),
        ("train/loop.py", "from dcx_kernels.recipes.dce import run", "point down"),
        ("train/loop.py", "from dcx_kernels import ChannelSet", "point down"),
        ("recipes/dce.py", "def f():\n    import dcx_kernels.cli", "point down"),
        ("recipes/dce.py", "if TYPE_CHECKING:\n    import dcx_kernels.cli", "point down"),
        ("cli/train.py", "import dcx_kernels", "point down"),
        ("cli/train.py", "from dcx_kernels import *", "point down"),
        ("ops/conv.py", "import_module('dcx_kernels.graph')", "point down"),
        ("ops/conv.py", "importlib.import_module('dcx_kernels.graph')", "point down"),
        ("ops/conv.py", "from . import gather", "relative import of '..gather'"),
        ("ops/conv.py", "from ..kernels.reference import x", "relative import"),
        ("ops/conv.py", "import triton", "may be imported only by"),
        ("ops/conv.py", "from triton import language as tl", "may be imported only by"),
        ("ops/conv.py", "from dcx_kernels.kernels import triton", "may be imported only by"),
        ("kernels/reference.py", "import triton.language as tl", "may be imported only by"),
        ("cli/info.py", "importlib.util.find_spec('triton')", "may be imported only by"),
        ("ops/conv.py", "from dcx_kernels import _C_cpu", "may be imported only by"),
        ("ops/conv.py", "import dcx_kernels._C", "may be imported only by"),
        ("ops/conv.py", "torch.ops.load_library(path)", "may be imported only by"),
        ("ops/conv.py", "from dcx_kernels.kernels.native import x", "may be imported only by"),
        ("utils/misc.py", "import torch", "'utils' has no layer"),
        ("ops/conv.py", "from dcx_kernels.utils.misc import x", "has no layer"),
        ("ops/conv.py", "from dcx_kernels.utils import x", "has no layer"),
    ],
)
def test_checker_finds_an_offender(path: str, source: str, message: str) -> None:
    broken = check_imports(f"dcx_kernels/{path}", source)
    assert len(broken) == 1
    assert message in broken[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("channel_set.py", "from dcx_kernels.errors import expected"),
        ("kernels/backend.py", "import triton\nimport dcx_kernels.kernels.native"),
        ("kernels/backend.py", "from dcx_kernels import _C_cpu"),
        ("kernels/native/_library.py", "torch.ops.load_library(path)"),
        ("kernels/triton/conv.py", "import triton.language as tl"),
        ("nn/conv.py", "from dcx_kernels.ops import channel_conv2d\nimport tritonish"),
        ("graph/convert.py", "from dcx_kernels.nn import X\nfrom dcx_kernels.graph.trace import t"),
        ("selectors/cucb.py", "from dcx_kernels import channel_set, errors"),
        ("train/loop.py", "import dcx_kernels.graph, dcx_kernels.selectors"),
        ("recipes/dce.py", "from dcx_kernels import train"),
        ("cli/info.py", "from dcx_kernels import __version__"),
        ("cli/__init__.py", "def main():\n    from dcx_kernels.recipes import dce"),
        ("__init__.py", "from dcx_kernels import nn, optim, selectors\nimport dcx_kernels.cli"),
    ],
)
def test_checker_accepts_what_is_allowed(path: str, source: str) -> None:
    assert check_imports(f"dcx_kernels/{path}", source) == []


def test_checker_finds_long_and_non_ascii_files() -> None:
    assert check_text("tests/x.py", "x = 1\n" * MAX_LINES) == []
    assert "401 lines" in check_text("tests/x.py", "x = 1\n" * (MAX_LINES + 1))[0]
    assert "tests/x.py:2: not ASCII" in check_text("tests/x.py", "x = 1\n# \u00fc\n")[0]
