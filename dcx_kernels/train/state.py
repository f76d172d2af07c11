"""A training run as one tree of state, and back: checked completely before anything changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from dcx_kernels.errors import CheckpointError, expected
from dcx_kernels.train import rng
from dcx_kernels.train.tree import Tree

if TYPE_CHECKING:
    from dcx_kernels.train.loop import Trainer

__all__ = ["capture", "restore"]

_KEYS = {"config", "model", "optimizer", "selector", "rng", "position", "log_rows"}


def capture(trainer: Trainer) -> Tree:
    """Return everything the next step depends on, and the place in the log."""
    selector = trainer.selector
    return {
        "config": dict(trainer.config),
        "model": dict(trainer.model.state_dict()),
        "optimizer": {
            "kind": type(trainer.optimizer).__name__,
            "state": trainer.optimizer.state_dict(),
        },
        "selector": None
        if selector is None
        else {"kind": type(selector).__name__, "state": dict(selector.state_dict())},
        "rng": rng.capture(),
        "position": trainer.position.as_dict(),
        "log_rows": trainer.log.rows,
    }


def restore(trainer: Trainer, state: Tree) -> None:
    """Put a captured state into a trainer that was built the same way.

    Raises:
        CheckpointError: if the state is of another configuration, model, optimizer or selector.
            Nothing has changed then.
    """
    if not isinstance(state, dict) or set(state) != _KEYS:
        got = sorted(state) if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(expected(f"a checkpoint with {sorted(_KEYS)}", got))
    _check_config(trainer.config, state["config"])
    _check_tensors("model", trainer.model.state_dict(), state["model"])
    _check_optimizer(trainer.optimizer, state["optimizer"])
    selector = trainer.selector
    kind = None if state["selector"] is None else state["selector"]["kind"]
    wanted = None if selector is None else type(selector).__name__
    if kind != wanted:
        raise CheckpointError(expected(f"a checkpoint with selector {wanted}", kind))
    if selector is not None:
        try:  # first of all changes, because it checks itself
            selector.load_state_dict(state["selector"]["state"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint's selector does not fit: {error}") from error
    trainer.optimizer.load_state_dict(state["optimizer"]["state"])
    trainer.model.load_state_dict(state["model"])
    trainer.position.load_dict(state["position"])
    trainer.log.truncate(state["log_rows"])
    rng.restore(state["rng"])


def _check_config(own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    for key in sorted(set(own) | set(saved)):
        if own.get(key) != saved.get(key):
            where = f"the checkpoint is of another run: {key}"
            raise CheckpointError(expected(_short(own.get(key)), _short(saved.get(key)), where))


def _check_tensors(where: str, own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    where = f"the checkpoint is of another {where}"
    if own.keys() != saved.keys():
        missing = sorted(own.keys() - saved.keys())
        extra = sorted(saved.keys() - own.keys())
        name, verb = (missing[0], "no such") if missing else (extra[0], "that")
        raise CheckpointError(f"{where}: it has {verb} entry {name!r}")
    for name, tensor in own.items():
        mine, theirs = _kind(tensor), _kind(saved[name])
        if mine != theirs:
            raise CheckpointError(expected(f"{name} of {mine}", theirs, where))


def _check_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    kind = type(optimizer).__name__
    if saved["kind"] != kind:
        raise CheckpointError(expected(f"a checkpoint with optimizer {kind}", saved["kind"]))
    own = optimizer.state_dict()
    mine = [group["params"] for group in own["param_groups"]]
    theirs = [group["params"] for group in saved["state"]["param_groups"]]
    if mine != theirs:
        sizes = [len(group) for group in theirs]
        what = f"optimizer parameter groups of {[len(group) for group in mine]}"
        raise CheckpointError(expected(what, sizes, "the checkpoint is of another run"))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in saved["state"]["state"].items():
        for name, value in entries.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if not 0 <= index < len(parameters) or value.shape != parameters[index].shape:
                got = f"{tuple(value.shape)} for parameter {index}"
                what = f"optimizer entry {name} shaped like its parameter"
                raise CheckpointError(expected(what, got))


def _kind(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)} and {tensor.dtype}".replace("torch.", "")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
