"""The loop does what Algorithm 1 says, in its order, and stops cleanly."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcx_kernels.data import Loader
from dcx_kernels.errors import NonFiniteError
from dcx_kernels.graph import ChannelModel
from dcx_kernels.selectors import CUCB, Static
from dcx_kernels.train import checkpoint
from dcx_kernels.train.log import read_rows
from dcx_kernels.train.loop import Trainer

Make = Callable[..., Any]


def _everything(trainer: Trainer) -> dict[str, Tensor]:
    state = {f"model/{name}": value for name, value in trainer.model.state_dict().items()}
    for index, entries in trainer.optimizer.state_dict()["state"].items():
        state |= {f"optimizer/{index}/{name}": value for name, value in entries.items()}
    assert trainer.selector is not None
    state |= {f"selector/{k}": torch.as_tensor(v) for k, v in _tensors(trainer.selector).items()}
    return {name: torch.as_tensor(value).clone() for name, value in state.items()}


def _tensors(selector: Any) -> dict[str, Any]:
    return {k: v for k, v in selector.state_dict().items() if isinstance(v, Tensor | int)}


def _assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(got[name], wanted[name])]
    assert not different


def test_step_order_is_that_of_algorithm_1(
    trainer_in: Make, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_in()
    model, selector, optimizer = trainer.model, trainer.selector, trainer.optimizer
    events: list[str] = []

    def spy(owner: object, method: str) -> None:
        original = getattr(owner, method)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            events.append(method)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, method, wrapper)

    for owner, method in [
        (selector, "select"),
        (model, "set_active"),
        (model, "forward"),
        (model, "saliency"),
        (selector, "update"),
        (optimizer, "step"),
    ]:
        spy(owner, method)
    trainer.fit(loader, 1)
    one = ["select", "set_active", "forward", "saliency", "update", "step"]
    assert events[: 6 * len(loader)] == one * len(loader)


def test_fit_equals_a_loop_written_by_hand(
    trainer_in: Make, channel_model: Make, loader: Loader
) -> None:
    trainer = trainer_in(seed=3)
    trainer.fit(loader, 2)
    hand = trainer_in(seed=3)
    model, selector, optimizer = hand.model, hand.selector, hand.optimizer
    for epoch in range(2):
        optimizer.param_groups[0]["lr"] = 0.05 if epoch == 0 else 0.005
        for images, labels in loader.batches(epoch):
            model.train()
            model.set_active(selector.select())
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            selector.update(model.saliency())
            optimizer.step()
    _assert_equal(_everything(trainer), _everything(hand))
    assert selector.num_steps == 2 * len(loader)


def test_fit_plain_module_without_selector(dense_model: Make, loader: Loader) -> None:
    model = dense_model()
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    Trainer(model, None, optimizer).fit(loader, 2)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_fit_learns(trainer_in: Make, loader: Loader, tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    trainer.fit(loader, 10)
    losses = [r["train_loss"] for r in read_rows(tmp_path / "log.jsonl") if r["kind"] == "epoch"]
    assert losses[-1] < 0.5 * losses[0]


def test_log_rows(trainer_in: Make, loader: Loader, test_loader: Loader, tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    trainer.fit(loader, 2, eval_loader=test_loader)
    rows = read_rows(tmp_path / "log.jsonl")
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == list(range(1, 2 * len(loader) + 1))
    assert {row["active"] for row in steps} == {14}
    assert all(sum(row["widths"].values()) == 14 for row in steps)
    epochs = [row for row in rows if row["kind"] == "epoch"]
    assert [row["lr"] for row in epochs] == [0.05, pytest.approx(0.005)]
    assert all(0 <= row["test_accuracy"] <= 1 for row in epochs)
    assert epochs[0]["train_loss"] == pytest.approx(
        sum(row["loss"] for row in steps[: len(loader)]) / len(loader)
    )


def test_until_stops_early_on_the_schedule_of_the_whole_run(
    trainer_in: Make, loader: Loader
) -> None:
    trainer = trainer_in()
    trainer.fit(loader, 4, until=3)
    assert trainer.position.epoch == 3
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.005)
    trainer.fit(loader, 4)
    assert trainer.position.epoch == 4


def test_static_selector_needs_no_saliency(
    trainer_in: Make, channel_model: Make, loader: Loader
) -> None:
    model = channel_model()
    model.saliency_reduction = None
    sets = CUCB(model.groups, 0.5).final()
    trainer = trainer_in(model=model, selector=Static(sets))
    trainer.fit(loader, 1)
    assert model.active == sets


def test_model_and_selector_must_fit(channel_model: Make, dense_model: Make) -> None:
    channel, dense = channel_model(), dense_model()
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="expected a selector for a ChannelModel"):
        Trainer(channel, None, optimizer)
    with pytest.raises(ValueError, match="and for nothing else"):
        Trainer(dense, CUCB(channel.groups, 0.5), optimizer)
    with pytest.raises(ValueError, match="checkpoint_every to be positive"):
        Trainer(dense, None, optimizer, checkpoint_every=0)


class _PoisonAt:
    """A loss that is NaN in one step."""

    def __init__(self, step: int) -> None:
        self.step, self.calls = step, 0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        loss = F.cross_entropy(logits, labels)
        return loss * math.nan if self.calls == self.step else loss


@pytest.mark.parametrize("step", [1, 3, 7])
def test_nan_loss_stops_and_keeps_the_state_before(
    trainer_in: Make, loader: Loader, tmp_path: Path, step: int
) -> None:
    good = trainer_in()
    states = []
    original = good.optimizer.step

    def remember() -> None:
        original()
        states.append(None)

    good.optimizer.step = remember  # count real steps
    trainer = trainer_in(tmp_path, loss_fn=_PoisonAt(step))
    with pytest.raises(NonFiniteError, match=rf"step {step} \(epoch {1 + (step - 1) // 5}\)"):
        trainer.fit(loader, 2)
    wanted = trainer_in()
    _run_steps(wanted, loader, step - 1)
    _assert_equal(_everything(trainer), _everything(wanted))
    assert trainer.position.step == step - 1
    saved = checkpoint.load(tmp_path / "checkpoints" / "latest.safetensors")
    assert saved["position"]["step"] == step - 1
    for name, value in wanted.model.state_dict().items():
        assert torch.equal(saved["model"][name], value), name
    assert all(p.grad is None for p in trainer.model.parameters())


def _run_steps(trainer: Trainer, loader: Loader, steps: int) -> None:
    """Run exactly ``steps`` steps of the loop."""

    class EnoughError(Exception):
        pass

    class Short:
        def __len__(self) -> int:
            return len(loader)

        def batches(self, epoch: int, start_step: int = 0) -> Any:
            for batch in loader.batches(epoch, start_step):
                if trainer.position.step == steps:
                    raise EnoughError
                yield batch

    with pytest.raises(EnoughError):
        trainer.fit(Short(), 2)  # type: ignore[arg-type]


def test_non_finite_saliency_stops_likewise(
    trainer_in: Make, loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_in(tmp_path)
    original = trainer.model.saliency

    def poisoned(reduction: str) -> dict[str, Tensor]:
        values = original(reduction)
        if trainer.position.step == 2:
            values = {name: value * math.inf for name, value in values.items()}
        return values

    monkeypatch.setattr(trainer.model, "saliency", poisoned)
    with pytest.raises(NonFiniteError, match=r"step 3 \(epoch 1\): .*saliency"):
        trainer.fit(loader, 2)
    wanted = trainer_in()
    _run_steps(wanted, loader, 2)
    _assert_equal(_everything(trainer), _everything(wanted))


def test_resume_after_nan_goes_on_where_it_stopped(
    trainer_in: Make, loader: Loader, tmp_path: Path
) -> None:
    with pytest.raises(NonFiniteError):
        trainer_in(tmp_path, loss_fn=_PoisonAt(4)).fit(loader, 2)
    again = trainer_in(tmp_path)
    again.load(tmp_path / "checkpoints" / "latest.safetensors")
    again.fit(loader, 2)
    straight = trainer_in()
    straight.fit(loader, 2)
    _assert_equal(_everything(again), _everything(straight))


@pytest.mark.gpu
def test_fit_on_a_gpu_starts_like_on_the_cpu(
    channel_model: Make, trainer_in: Make, loader_of: Make, tmp_path: Path
) -> None:
    for device in ("cpu", "cuda"):
        model = channel_model().to(device)
        trainer_in(tmp_path / device, model=model).fit(loader_of(device=device), 2)
    cpu, gpu = (
        [row for row in read_rows(tmp_path / d / "log.jsonl") if row["kind"] == "step"]
        for d in ("cpu", "cuda")
    )
    assert len(gpu) == len(cpu)
    assert gpu[0]["loss"] == pytest.approx(cpu[0]["loss"], rel=0.2)  # other dropout draws


def test_batch_norm_only_buffers_are_snapshot(channel_model: Make) -> None:
    model = channel_model()
    assert isinstance(model, ChannelModel)
    names = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    assert names == {"running_mean", "running_var", "num_batches_tracked"}
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 2
