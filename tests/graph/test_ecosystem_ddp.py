"""DistributedDataParallel: dense gradients train as ever, compact ones are refused.

Run by torchrun, this file is the program of each rank.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dcx_kernels as dcx
from networks import batch, random_sets
from tolerances import assert_exact, assert_gradients_close

SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
STEPS, RANKS = 3, 2


@pytest.fixture
def _alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("owner", ["model", "wrapper"])
def test_compact_gradients_are_refused(owner: str) -> None:
    """They never reach a parameter's .grad: the ranks would drift apart without a word."""
    dense, x, t = batch("vgg19")
    model = dcx.convert(dense, x)
    wrapped = DistributedDataParallel(model)
    optimizer = dcx.optim.SGD(model if owner == "model" else wrapped, lr=0.1)
    F.cross_entropy(model(x), t).backward()  # outside of it they are welcome
    with pytest.raises(ValueError, match=r"model.grads = 'dense' .* DistributedDataParallel"):
        wrapped(x)
    optimizer.zero_grad()
    model.grads = "dense"
    dcx.optim.SGD(model if owner == "model" else wrapped, lr=0.1)
    F.cross_entropy(wrapped(x), t).backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        assert_exact(wrapped.eval()(x), model(x))


@pytest.mark.slow
def test_two_ranks_train_as_one_masked_network() -> None:
    here = Path(__file__).resolve()
    roots = [str(here.parents[2]), str(here.parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(roots), "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command = [sys.executable, *launch, str(here)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ranks agree") == 1


def _train(
    network: nn.Module,
    model: dcx.ChannelModel,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
    sets: list[dict[str, dcx.ChannelSet]],
) -> dict[str, Tensor]:
    """Train ``network``, which runs ``model``; return the weights."""
    x, t = data
    for chosen in sets:
        model.set_active(chosen)
        optimizer.zero_grad()
        F.cross_entropy(network(x), t).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def _compare(mode: bool, inactive: str) -> None:
    """Train on half of the batch a rank; compare the ranks, and both with what they should be.

    Args:
        mode: training; in evaluation mode norms do not see the batch, so that halves make a whole.
        inactive: of the optimizer of the sparse network.
    """
    rank = dist.get_rank()
    torch.manual_seed(0)
    dense, x, t = batch("vgg19")
    share = x[rank::RANKS], t[rank::RANKS]
    models = {way: dcx.convert(dense, x, execution=way).train(mode) for way in ("sparse", "mask")}
    for model in models.values():
        model.grads = "dense"
    torch.manual_seed(1)
    sets = [random_sets(models["sparse"]) for _ in range(STEPS)]
    sparse, masked = models["sparse"], models["mask"]
    optimizer = dcx.optim.SGD(sparse, inactive=inactive, **SGD)
    weights = _train(DistributedDataParallel(sparse), sparse, optimizer, share, sets)
    for name, mine in weights.items():
        others = [torch.empty_like(mine) for _ in range(RANKS)]
        dist.all_gather(others, mine)
        assert_exact(others[1 - rank], mine, name)
    if inactive == "decay":  # what torch's own optimizer does
        reference: torch.optim.Optimizer = torch.optim.SGD(masked.parameters(), **SGD)
    else:
        reference = dcx.optim.SGD(masked, **SGD)
    if mode:
        expected = _train(DistributedDataParallel(masked), masked, reference, share, sets)
    else:
        expected = _train(masked, masked, reference, (x, t), sets)
    assert_gradients_close(weights, expected)
    assert not torch.equal(weights["classifier.weight"], dense.get_parameter("classifier.weight"))


def _main() -> None:
    dist.init_process_group("gloo")
    for mode in (True, False):
        for inactive in ("frozen", "decay"):
            _compare(mode, inactive)
    dist.barrier()
    if dist.get_rank() == 0:
        sys.stdout.write("ranks agree\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    _main()
