"""Checks on a selector's state before any of it is taken over."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dcx_kernels.errors import expected

__all__ = ["State", "check_state", "read_generator"]

State = dict[str, Tensor | int | float | str | None]


def check_state(state: Mapping[str, object], mine: State, fixed: Iterable[str], where: str) -> None:
    """Check that ``state`` could have come from the selector whose own state is ``mine``.

    Args:
        state: what a checkpoint holds.
        mine: the selector's present state: its keys, dtypes and shapes are what is expected.
        fixed: keys of arguments of the constructor, which must agree.
        where: name of the selector, for messages.

    Raises:
        ValueError: naming the first entry that disagrees, and both values.
    """
    for key in mine:
        if key not in state:
            raise ValueError(expected(f"an entry {key!r} in the state", "none", where))
    for key in state:
        if key not in mine:
            raise ValueError(expected("only known entries in the state", repr(key), where))
    if state["kind"] != mine["kind"]:
        raise ValueError(expected(f"the state of a {where}", repr(state["kind"]), where))
    _check_groups(state["groups"], mine["groups"], where)
    for key in fixed:
        if state[key] != mine[key]:
            what = f"the state of a selector with {key}={mine[key]}"
            raise ValueError(expected(what, f"{key}={state[key]}", where))
    for key, value in mine.items():
        _check_form(state[key], value, f"{where} state, {key!r}")


def read_generator(saved: object, where: str) -> torch.Generator:
    """Return a new CPU generator in the state ``saved``, a uint8 tensor.

    Raises:
        ValueError: if torch does not accept it as a generator's state.
    """
    generator = torch.Generator()
    try:
        assert isinstance(saved, Tensor)  # check_state has seen it
        generator.set_state(saved.cpu())
    except RuntimeError as error:
        raise ValueError(expected("a generator's state", str(error), where)) from error
    return generator


def _check_form(got: object, mine: object, where: str) -> None:
    if isinstance(mine, Tensor):
        if not isinstance(got, Tensor) or got.dtype != mine.dtype or got.shape != mine.shape:
            raise ValueError(expected(_describe(mine), _describe(got), where))
    elif type(got) is not type(mine):
        raise ValueError(expected(type(mine).__name__, repr(got), where))


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return repr(value)


def _check_groups(got: object, mine: object, where: str) -> None:
    """Compare the JSON of two {name: num_channels}; the message names the group."""
    if got == mine:
        return
    ours = json.loads(str(mine))
    try:
        theirs = dict(json.loads(str(got)))
    except (TypeError, ValueError):
        raise ValueError(expected("JSON of {group: num_channels}", repr(got), where)) from None
    for name in [*ours, *theirs]:
        a, b = ours.get(name, "no such group"), theirs.get(name, "no such group")
        if a != b:
            what = f"group {name!r} to be as in the selector ({a})"
            raise ValueError(expected(what, f"{b} in the state", where))
    raise ValueError(expected(f"groups in the order {list(ours)}", list(theirs), where))
