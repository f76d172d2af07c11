"""The names users rely on, their docstrings, and the single-sourced version."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import dcx_kernels as dcx

PACKAGE = Path(inspect.getfile(dcx)).parent

TOP_LEVEL = [
    "ChannelGroup",
    "ChannelSet",
    "GatedConv2d",
    "SparseChannelConv2d",
    "Trainer",
    "channel_conv2d",
    "clip_grad_norm_",
    "compact",
    "convert",
    "convert_fbs",
    "cost",
    "count_winners",
    "cut_unused",
    "gate_penalty",
    "load_compact",
    "memory_access",
    "optim",
    "revert",
    "selectors",
]
NESTED = [
    "SparseChannelConv2d.from_dense",
    "SparseChannelConv2d.set_active",
    "Trainer.fit",
    "models.vgg16",
    "models.vgg19",
    "optim.AdamW",
    "optim.SGD",
    *(
        f"selectors.{name}.{method}"
        for name in ("CUCB", "DCP", "Random", "Static")
        for method in ("select", "update", "final", "state_dict", "load_state_dict")
    ),
]


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_name_is_public(name: str) -> None:
    assert hasattr(dcx, name)
    assert name in dcx.__all__


@pytest.mark.parametrize("name", NESTED)
def test_nested_name_exists(name: str) -> None:
    head, *rest = name.split(".")
    value = importlib.import_module(f"dcx_kernels.{head}") if head.islower() else getattr(dcx, head)
    for attribute in rest:
        value = getattr(value, attribute)
    assert callable(value)


def _modules() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = list(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        if not any(part.startswith("_") for part in parts):
            yield ".".join(parts), ast.parse(file.read_text(encoding="utf-8"))


def _public_definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node


def _undocumented(name: str, tree: ast.Module) -> list[str]:
    found = [] if ast.get_docstring(tree) else [name]
    for node in _public_definitions(tree):
        if not ast.get_docstring(node):
            found.append(f"{name}.{node.name}")
    return found


def _unlisted(name: str, tree: ast.Module, listed: list[str]) -> list[str]:
    return [f"{name}.{n.name}" for n in _public_definitions(tree) if n.name not in listed]


def test_everything_public_has_a_docstring() -> None:
    modules = list(_modules())
    assert len(modules) > 10, f"no modules found under {PACKAGE}"
    missing = [line for name, tree in modules for line in _undocumented(name, tree)]
    assert not missing, f"without a docstring: {', '.join(missing)}"


def test_docstring_check_finds_an_offender() -> None:
    source = '"""Doc."""\ndef bad(): ...\ndef _private(): ...\nclass Good:\n    """Doc."""\n'
    assert _undocumented("m", ast.parse(source)) == ["m.bad"]
    assert _undocumented("m", ast.parse("x = 1")) == ["m"]


def test_everything_public_is_in_all() -> None:
    missing = []
    for name, tree in _modules():
        listed = getattr(importlib.import_module(name), "__all__", [])
        missing += _unlisted(name, tree, listed)
    assert not missing, f"not in their module's __all__: {', '.join(missing)}"


def test_all_check_finds_an_offender() -> None:
    tree = ast.parse("def bad(): ...\ndef good(): ...\ndef _private(): ...")
    assert _unlisted("m", tree, ["good"]) == ["m.bad"]


def test_all_names_exist() -> None:
    for name, _ in _modules():
        module = importlib.import_module(name)
        absent = [n for n in getattr(module, "__all__", []) if not hasattr(module, n)]
        assert not absent, f"{name}.__all__ names what is not there: {absent}"


def test_version_is_written_once_as_a_literal() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    values = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and any(isinstance(t, ast.Name) and t.id == "__version__" for t in node.targets)
    ]
    # a literal, so that building a wheel reads it without importing torch
    assert len(values) == 1
    assert ast.literal_eval(values[0]) == dcx.__version__


def test_version_equals_installed_metadata() -> None:
    try:
        installed = importlib.metadata.version("dcx_kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("dcx_kernels is imported from a checkout, not installed")
    assert installed == dcx.__version__, "the install is stale: touch pyproject.toml, make test"
