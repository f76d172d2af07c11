"""Feature boosting and suppression of a whole network: every convolution gets a gate.

References:
    Gao et al., "Dynamic Channel Pruning: Feature Boosting and Suppression", ICLR 2019.
    https://arxiv.org/abs/1810.05331
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dcx_kernels.errors import expected
from dcx_kernels.graph.edit import compiled
from dcx_kernels.graph.fbs_cut import cut_channels_
from dcx_kernels.graph.fbs_edit import gated_graph
from dcx_kernels.graph.fbs_find import find_units
from dcx_kernels.graph.fbs_init import Init, gate_conv
from dcx_kernels.graph.structure import Structure, find_structure
from dcx_kernels.graph.trace import LeafModules, trace
from dcx_kernels.graph.walk import Policy
from dcx_kernels.nn.gated_conv import GatedConv2d, gate_penalty
from dcx_kernels.nn.gated_conv_parts import Subsample

__all__ = ["FBSModel", "convert_fbs"]

Stats = Literal["batch", "active"]


class FBSModel(nn.Module):
    """A network made by `convert_fbs`; its modules carry the dense network's names.

    A gated layer stands where the convolution stood; its batch norm and ReLU are part of it.
    Between gated layers only the winners of each sample exist.

    Attributes:
        kept: convolutions that have no gate, with the reason.
        structure: of the dense network, with channels that an add joins made one.
        axes: layer -> which of its channels there are.
        fixed: gated layers of which no channel can be cut, see `fbs_prune`.
        left: for every channel number of ``structure`` whether it is still there.
    """

    def __init__(
        self,
        root: nn.Module,
        forwards: Mapping[bool, Any],
        kept: Mapping[str, str],
        structure: Structure,
        fixed: Iterable[str] = (),
    ) -> None:
        super().__init__()
        self._modules, self._parameters = root._modules, root._parameters
        self._buffers = root._buffers
        self._non_persistent_buffers_set = root._non_persistent_buffers_set
        self.training = root.training
        self.kept = dict(kept)
        self.structure, self.axes = structure, dict(structure.axes)
        self.fixed = frozenset(fixed)
        self.left = np.ones(structure.free.shape, np.bool_)
        self._forwards = dict(forwards)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of the current mode."""
        return self._forwards[self.training](self, *args, **kwargs)

    @property
    def gated(self) -> dict[str, GatedConv2d]:
        """Gated layers by name, in the order of definition."""
        return {n: m for n, m in self.named_modules() if isinstance(m, GatedConv2d)}

    def set_density(self, density: float) -> None:
        """Let every layer compute ceil(density * channels) winners from now on.

        Raises:
            ValueError: if it is not in (0, 1].
        """
        for layer in self.gated.values():
            layer.set_density(density)

    def set_stats(self, stats: Stats) -> None:
        """Normalise training batches by all samples, or by active ones; see `GatedConv2d`."""
        if stats not in ("batch", "active"):
            raise ValueError(expected("stats 'batch' or 'active'", repr(stats), "set_stats"))
        for layer in self.gated.values():
            layer.stats = stats

    def set_execution(self, execution: Literal["sparse", "mask"]) -> None:
        """Compute what exists, or everything with 0/1 factors; see `GatedConv2d`."""
        if execution not in ("sparse", "mask"):
            what = "execution 'sparse' or 'mask'"
            raise ValueError(expected(what, repr(execution), "set_execution"))
        for layer in self.gated.values():
            layer.execution = execution

    def cut_(self, left: NDArray[np.bool_]) -> None:
        """Take channels out for good, in place; see `dcx_kernels.cut_unused`, which says which.

        Parameters that shrink are new ones: an optimizer made before holds the old.
        """
        self.axes = cut_channels_(self, self.axes, left)
        self.left = self.left & left

    def get_extra_state(self) -> Tensor:
        """Return `left`, for the state_dict."""
        return torch.from_numpy(self.left.copy())

    def set_extra_state(self, state: Tensor) -> None:
        """Cut out what the network that is loaded does not have; its tensors fit then.

        Raises:
            ValueError: if it is another network, or has channels that are cut out here.
        """
        left = state.cpu().numpy().astype(np.bool_)
        if left.shape != self.left.shape:
            what = f"{self.left.size} channel numbers of this network"
            raise ValueError(expected(what, left.size, "load_state_dict"))
        if (left & ~self.left).any():
            what = f"a network with no channels but the {int(self.left.sum())} left here"
            raise ValueError(expected(what, int(left.sum()), "load_state_dict"))
        if (left != self.left).any():
            self.cut_(left)

    def gate_penalty(self, factor: float = 1e-8) -> Tensor:
        """Return the Lasso on all gates of the last forward, to be added to the loss."""
        return gate_penalty(self, factor)

    def __deepcopy__(self, memo: dict[int, Any]) -> FBSModel:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        for key, value in self.__dict__.items():
            new.__dict__[key] = value if key == "_forwards" else copy.deepcopy(value, memo)
        return new


def convert_fbs(
    model: nn.Module,
    example_inputs: Tensor | None = None,
    density: float = 1.0,
    init: Init = "paper",
    *,
    subsample: Subsample = "l1",
    beta_at: Literal["inside", "outside"] = "inside",
    stats: Stats = "batch",
    execution: Literal["sparse", "mask"] = "sparse",
    leaf_modules: LeafModules = (),
) -> FBSModel:
    """Gate every convolution of a CNN that a batch norm of its own follows.

    The model is copied. Stem and shortcuts are gated too; in a sum a channel is absent for a sample
    iff it is absent in both terms. What works on each channel alone and leaves zeros alone
    (pooling, ReLU, dropout) sees winners only; everything else sees all channels, with zeros.

    Args:
        model: a CNN that torch.fx can trace; trained or not.
        example_inputs: one batch of images; only its shape is read. None: images of 32 x 32.
        density: share of channels that win, see `FBSModel.set_density`.
        init: ``paper``: drop gamma, draw the gate; ``fold``: the same function at density 1.
        subsample, beta_at, stats, execution: see `GatedConv2d`.
        leaf_modules: classes of modules that torch.fx cannot follow and keeps whole.

    Raises:
        ValueError: on unknown options, a model that cannot be traced, or one without a convolution
            that could be gated (the message gives reasons).
        TypeError: if ``model`` is not a module, or converted already.
    """
    if not isinstance(model, nn.Module) or any(isinstance(m, GatedConv2d) for m in model.modules()):
        raise TypeError(expected("a dense torch.nn.Module", type(model).__name__, "convert_fbs"))
    if init not in ("paper", "fold"):
        raise ValueError(expected("init 'paper' or 'fold'", repr(init), "convert_fbs"))
    if not 0 < density <= 1:
        raise ValueError(expected("a density in (0, 1]", density, "convert_fbs"))
    root = copy.deepcopy(model)
    images = _example(root) if example_inputs is None else example_inputs
    programs = trace(root, (images,), leaf_modules)
    units, kept = find_units(root, {mode: p.graph for mode, p in programs.items()})
    if not units:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in kept.items()) or "it has none"
        raise ValueError(expected("convolutions that can be gated", reasons, "convert_fbs"))
    # before the layers change: what an add joins is cut together, see `fbs_prune`
    structure = find_structure(root, programs, Policy("tie", "keep"))
    modules = dict(root.named_modules())
    edited = {mode: gated_graph(modules, p.graph, units) for mode, p in programs.items()}
    for unit in units.values():
        conv: Any = modules[unit.conv]
        norm: Any = modules[unit.norm]
        layer = gate_conv(
            conv, norm, init, density=density, subsample=subsample, beta_at=beta_at, stats=stats,
            relu=unit.relu, execution=execution,
        )  # fmt: skip
        layer.compact_output = True
        _place(root, unit.conv)[unit.conv.rpartition(".")[2]] = layer
        del _place(root, unit.norm)[unit.norm.rpartition(".")[2]]
    forwards = {mode: compiled(root, graph) for mode, (graph, _) in edited.items()}
    fixed = set().union(*(names for _, names in edited.values()))
    return FBSModel(root, forwards, kept, structure, fixed)


def _place(root: nn.Module, name: str) -> dict[str, Any]:
    """Return the table of modules that holds ``name``."""
    return root.get_submodule(name.rpartition(".")[0])._modules


def _example(model: nn.Module) -> Tensor:
    """Make an image of the first convolution's channels."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.weight.detach().new_zeros((1, module.in_channels, 32, 32))
    raise ValueError(expected("a model with convolutions", type(model).__name__, "convert_fbs"))
