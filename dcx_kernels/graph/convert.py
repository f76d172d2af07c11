"""From a dense model to a `ChannelModel` and back."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from dcx_kernels.errors import expected
from dcx_kernels.graph.execution import Execution
from dcx_kernels.graph.groups import ChannelGroup, GroupBuilder
from dcx_kernels.graph.mask import MaskExecution
from dcx_kernels.graph.model import ChannelModel
from dcx_kernels.graph.rules import Walk
from dcx_kernels.graph.sparse import SparseExecution
from dcx_kernels.graph.trace import Program, trace
from dcx_kernels.nn._saliency import Reduction

__all__ = ["convert", "find_groups", "revert"]


def convert(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    residual: Literal["keep"] = "keep",
    execution: Literal["sparse", "mask"] = "sparse",
    *,
    saliency: Reduction | None = "batch",
) -> ChannelModel:
    """Make a model whose channels can be switched on and off at every step.

    The model is copied; the copy's state_dict has the same keys and shapes. All channels are active
    at first.

    Args:
        model: any CNN that torch.fx can trace. What has no rule yet (residual adds,
            concatenations, grouped
            convolutions, layer norms, ...) keeps the groups it touches full-width, see
            ``model.groups[...].reason``.
        example_inputs: one input, or a tuple of them; shapes are read, values are not.
        residual: groups joined by an add stay full-width ("keep").
        execution: ``"sparse"`` computes active channels only; ``"mask"`` computes everything and
            multiplies by 0/1 (the papers' baseline; the oracle of the sparse one).
        saliency: what backward measures, see `ChannelModel.saliency_reduction`.

    Raises:
        ValueError: on unknown options, a model without a selectable group, or one that cannot be
            traced.
        TypeError: if the model is converted already or is not a module.
    """
    if isinstance(model, ChannelModel) or not isinstance(model, nn.Module):
        raise TypeError(expected("a dense torch.nn.Module", type(model).__name__, "convert"))
    if residual != "keep":
        raise ValueError(expected("residual='keep'", repr(residual), "convert"))
    if execution not in ("sparse", "mask"):
        raise ValueError(expected("execution 'sparse' or 'mask'", repr(execution), "convert"))
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    root = copy.deepcopy(model)
    programs = trace(root, inputs)
    groups = find_groups(root, programs)
    if not any(group.selectable for group in groups.values()):
        reasons = "; ".join(f"{name}: {group.reason}" for name, group in groups.items())
        what = "at least one group whose channels may be switched off"
        raise ValueError(expected(what, f"none ({reasons or 'no convolution'})", "convert"))
    skeleton = copy.deepcopy(model).to("meta")
    way: Execution = SparseExecution() if execution == "sparse" else MaskExecution()
    way.prepare(root, programs, groups)
    shapes = [tuple(x.shape) for x in inputs]
    converted = ChannelModel(root, skeleton, programs, groups, way, shapes)
    converted.saliency_reduction = saliency
    return converted


def find_groups(model: nn.Module, programs: dict[bool, Program]) -> dict[str, ChannelGroup]:
    """Find the channel groups that hold in both graphs of a model."""
    builder = GroupBuilder()
    for program in programs.values():
        Walk(model, program, builder)
    return builder.build()


def revert(model: ChannelModel) -> nn.Module:
    """Return the original architecture with the full weights, as a copy.

    Raises:
        TypeError: if ``model`` was not made by `convert`.
    """
    if not isinstance(model, ChannelModel):
        raise TypeError(expected("a model made by convert", type(model).__name__, "revert"))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return model.fill(model.skeleton(), state)
