"""A run that was interrupted ends bit for bit like one that was not."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dcx_kernels.data import Loader
from dcx_kernels.errors import CheckpointError
from dcx_kernels.optim import AdamW
from dcx_kernels.selectors import DCP, Random
from dcx_kernels.train import checkpoint
from dcx_kernels.train.log import TIMINGS, Log, read_rows
from dcx_kernels.train.loop import Trainer

Make = Callable[..., Any]
EPOCHS = 3
LATEST = "checkpoints/latest.safetensors"


class _KilledError(Exception):
    """Stands for kill -9: nothing is saved on the way out."""


class _KilledAfter:
    """A loader that dies after some steps of the whole run."""

    def __init__(self, loader: Loader, steps: int, action: Callable[[], None]) -> None:
        self.loader, self.left, self.action = loader, steps, action

    def __len__(self) -> int:
        return len(self.loader)

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.loader.batches(epoch, start_step):
            if self.left == 0:
                self.action()
            self.left -= 1
            yield batch


def _kill() -> None:
    raise _KilledError


def _control_c() -> None:
    signal.raise_signal(signal.SIGINT)


def _rows(directory: Path) -> list[dict[str, Any]]:
    rows = read_rows(directory / "log.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


@pytest.fixture
def straight(
    trainer_in: Make, loader: Loader, test_loader: Loader, tmp_path: Path
) -> tuple[bytes, list[dict[str, Any]]]:
    """Checkpoint and log of a run without interruption."""
    directory = tmp_path / "straight"
    trainer_in(directory).fit(loader, EPOCHS, eval_loader=test_loader)
    return (directory / LATEST).read_bytes(), _rows(directory)


def _assert_same(directory: Path, straight: tuple[bytes, list[dict[str, Any]]]) -> None:
    data, rows = straight
    assert _rows(directory) == rows
    assert (directory / LATEST).read_bytes() == data


@pytest.mark.parametrize("steps", [3, 5, 6, 10, 14])
@pytest.mark.parametrize("every", [None, 1, 2])
def test_resume_after_kill_is_exact(
    trainer_in: Make,
    loader: Loader,
    test_loader: Loader,
    tmp_path: Path,
    straight: tuple[bytes, list[dict[str, Any]]],
    steps: int,
    every: int | None,
) -> None:
    trainer = trainer_in(tmp_path, checkpoint_every=every)
    with pytest.raises(_KilledError):
        trainer.fit(_KilledAfter(loader, steps, _kill), EPOCHS, eval_loader=test_loader)
    trainer = trainer_in(tmp_path, checkpoint_every=every)
    if (tmp_path / LATEST).exists():
        trainer.load(tmp_path / LATEST)
    else:
        trainer.log.truncate(0)
    at_epoch = steps // 5 * 5
    assert trainer.position.step == max(at_epoch, steps // every * every if every else 0)
    trainer.fit(loader, EPOCHS, eval_loader=test_loader)
    _assert_same(tmp_path, straight)


@pytest.mark.parametrize("steps", [0, 4, 9, 14])
def test_resume_after_control_c_is_exact(
    trainer_in: Make,
    loader: Loader,
    test_loader: Loader,
    tmp_path: Path,
    straight: tuple[bytes, list[dict[str, Any]]],
    steps: int,
) -> None:
    trainer = trainer_in(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(_KilledAfter(loader, steps, _control_c), EPOCHS, eval_loader=test_loader)
    assert trainer.position.step == steps + 1  # the step under way was finished
    trainer = trainer_in(tmp_path)
    trainer.load(tmp_path / LATEST)
    trainer.fit(loader, EPOCHS, eval_loader=test_loader)
    _assert_same(tmp_path, straight)


def test_control_c_while_evaluating_the_last_epoch_is_not_lost(
    trainer_in: Make, loader: Loader, test_loader: Loader, tmp_path: Path
) -> None:
    trainer = trainer_in(tmp_path)
    stopping = _KilledAfter(test_loader, 0, _control_c)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(loader, 1, eval_loader=stopping)
    assert checkpoint.load(tmp_path / LATEST)["position"]["epoch"] == 1


def test_resume_of_a_finished_run_changes_nothing(
    trainer_in: Make,
    loader: Loader,
    test_loader: Loader,
    tmp_path: Path,
    straight: tuple[bytes, list[dict[str, Any]]],
) -> None:
    directory = tmp_path / "straight"
    trainer = trainer_in(directory)
    trainer.load(directory / LATEST)
    trainer.fit(loader, EPOCHS, eval_loader=test_loader)
    _assert_same(directory, straight)


def test_resume_with_adamw_and_random_selector(
    channel_model: Make, loader: Loader, tmp_path: Path
) -> None:
    def build(directory: Path) -> Trainer:
        model = channel_model()
        torch.manual_seed(1)
        return Trainer(
            model,
            Random(model.groups, 0.4, seed=2),
            AdamW(model, lr=1e-3, weight_decay=0.01),
            checkpoint_dir=directory / "checkpoints",
            checkpoint_every=2,
            log=Log(directory / "log.jsonl", "sparse"),
        )

    build(tmp_path / "a").fit(loader, 2)
    with pytest.raises(_KilledError):
        build(tmp_path / "b").fit(_KilledAfter(loader, 7, _kill), 2)
    again = build(tmp_path / "b")
    again.load(tmp_path / "b" / LATEST)
    assert again.position.step == 6
    again.fit(loader, 2)
    assert (tmp_path / "a" / LATEST).read_bytes() == (tmp_path / "b" / LATEST).read_bytes()


@pytest.mark.parametrize("steps", [2, 4, 7, 13])  # in the warm-up and at every lambda
@pytest.mark.parametrize("strict", [False, True])
def test_resume_with_dcp_is_exact(
    trainer_in: Make, channel_model: Make, loader: Loader, tmp_path: Path, steps: int, strict: bool
) -> None:
    def build(directory: Path) -> Trainer:
        model = channel_model()
        model.saliency_reduction = "sample"
        decay = {0: 0.6, 5: 0.7, 10: 1.0}
        selector = DCP(model.groups, 0.5, decay=decay, warmup_steps=3, strict=strict)
        trainer: Trainer = trainer_in(directory, model=model, selector=selector, checkpoint_every=1)
        return trainer

    build(tmp_path / "a").fit(loader, EPOCHS)
    with pytest.raises(_KilledError):
        build(tmp_path / "b").fit(_KilledAfter(loader, steps, _kill), EPOCHS)
    again = build(tmp_path / "b")
    again.load(tmp_path / "b" / LATEST)
    assert again.position.step == steps
    again.fit(loader, EPOCHS)
    assert (tmp_path / "a" / LATEST).read_bytes() == (tmp_path / "b" / LATEST).read_bytes()
    assert _rows(tmp_path / "a") == _rows(tmp_path / "b")


def test_resume_of_a_plain_model_with_torch_sgd(
    dense_model: Make, loader: Loader, tmp_path: Path
) -> None:
    def build(directory: Path) -> Trainer:
        model = dense_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
        torch.manual_seed(1)
        return Trainer(model, None, optimizer, checkpoint_dir=directory, checkpoint_every=3)

    build(tmp_path / "a").fit(loader, 2)
    with pytest.raises(_KilledError):
        build(tmp_path / "b").fit(_KilledAfter(loader, 4, _kill), 2)
    again = build(tmp_path / "b")
    again.load(tmp_path / "b" / "latest.safetensors")
    again.fit(loader, 2)
    a, b = (checkpoint.load(tmp_path / name / "latest.safetensors") for name in "ab")
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("rng"), "expected a checkpoint with"),
        (lambda s: s["config"].update(model="other"), "of another run: model: expected 'tiny'"),
        (lambda s: s["model"].pop("bn1.weight"), "no such entry 'bn1.weight'"),
        (lambda s: s["model"].update(extra=torch.zeros(1)), "that entry 'extra'"),
        (
            lambda s: s["model"].update({"conv1.weight": torch.zeros(11, 3, 3, 3)}),
            r"conv1.weight of shape \(12, 3, 3, 3\) and float32, got shape \(11, 3, 3, 3\)",
        ),
        (
            lambda s: s["model"].update({"fc.bias": torch.zeros(5, dtype=torch.float64)}),
            "and float32, got .* and float64",
        ),
        (lambda s: s["optimizer"].update(kind="AdamW"), "optimizer SGD, got AdamW"),
        (
            lambda s: s["optimizer"]["state"]["param_groups"][0]["params"].pop(),
            "optimizer parameter groups",
        ),
        (
            lambda s: s["optimizer"]["state"]["state"][0].update(momentum_buffer=torch.zeros(2)),
            "momentum_buffer shaped like its parameter",
        ),
        (lambda s: s["selector"].update(kind="Random"), "selector CUCB, got Random"),
        (lambda s: s["selector"]["state"].update(density=0.3), "density"),
        (lambda s: s["selector"]["state"].pop("mean"), "mean"),
        (lambda s: s.update(selector=None), "selector CUCB, got None"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(
    trainer_in: Make,
    loader: Loader,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], object],
    message: str,
) -> None:
    trainer = trainer_in(tmp_path)
    trainer.fit(loader, 1)
    state = checkpoint.load(tmp_path / LATEST)
    change(state)
    checkpoint.save(tmp_path / "bad", state)
    other = trainer_in(seed=5)
    other.config = {"model": "tiny"}
    before = {k: v.clone() for k, v in other.model.state_dict().items()}
    generator = torch.get_rng_state()
    with pytest.raises(CheckpointError, match=message):
        other.load(tmp_path / "bad")
    assert all(torch.equal(before[k], v) for k, v in other.model.state_dict().items())
    assert not other.optimizer.state_dict()["state"]
    assert other.selector.num_steps == other.position.step == 0
    assert torch.equal(torch.get_rng_state(), generator)


def test_disk_full_during_training_keeps_the_previous_checkpoint(
    trainer_in: Make, loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_in(tmp_path)
    trainer.fit(loader, 3, until=1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("dcx_kernels.train.atomic.os.fsync", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            trainer.fit(loader, 3)
    again = trainer_in(tmp_path)
    again.load(tmp_path / LATEST)
    assert again.position.epoch == 1
