"""From a dense model to a `ChannelModel` and back."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from dcx_kernels.errors import expected
from dcx_kernels.graph.execution import Execution
from dcx_kernels.graph.mask import MaskExecution
from dcx_kernels.graph.model import ChannelModel
from dcx_kernels.graph.sparse import SparseExecution
from dcx_kernels.graph.structure import find_structure
from dcx_kernels.graph.trace import LeafModules, trace
from dcx_kernels.graph.walk import Grouped, Policy, Residual
from dcx_kernels.nn._saliency import Reduction

__all__ = ["convert", "revert"]


def convert(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    residual: Residual = "keep",
    execution: Literal["sparse", "mask"] = "sparse",
    *,
    grouped: Grouped = "keep",
    saliency: Reduction | None = "batch",
    leaf_modules: LeafModules = (),
) -> ChannelModel:
    """Make a model whose channels can be switched on and off at every step.

    The model is copied; the copy's state_dict has the same keys and shapes. All channels are active
    at first.

    Args:
        model: any CNN that torch.fx can trace. What no rule understands (layer norms, attention,
            ...) keeps the groups it touches full-width, see ``model.groups[...].reason``; where
            nothing is selectable the model is converted all the same.
        example_inputs: one input, or a tuple of them; shapes are read, values are not.
        residual: what becomes of groups joined by an add: ``"keep"``: they stay full-width;
            ``"tie"``: they are one group, so that the residual stream shrinks too; ``"union"``:
            each keeps its own set, and the sum has the union of their channels.
        execution: ``"sparse"`` computes active channels only; ``"mask"`` computes everything and
            multiplies by 0/1 (the papers' baseline; the oracle of the sparse one).
        grouped: input and output of grouped convolutions stay full-width (``"keep"``), or are
            selectable with equal counts in each group (``"equal"``). Depthwise convolutions follow
            their input under both.
        saliency: what backward measures, see `ChannelModel.saliency_reduction`.
        leaf_modules: classes (or their qualified names) of modules that torch.fx cannot follow and
            keeps whole.

    Raises:
        ValueError: on unknown options, a model that cannot be traced or cannot run the example
            inputs, or one whose containers have hooks.
        TypeError: if the model is converted already or is not a module, or an input no tensor.
    """
    if isinstance(model, ChannelModel) or not isinstance(model, nn.Module):
        raise TypeError(expected("a dense torch.nn.Module", type(model).__name__, "convert"))
    for option, given, allowed in (
        ("residual", residual, ("keep", "tie", "union")),
        ("execution", execution, ("sparse", "mask")),
        ("grouped", grouped, ("keep", "equal")),
    ):
        if given not in allowed:
            what = f"{option} {', '.join(map(repr, allowed[:-1]))} or {allowed[-1]!r}"
            raise ValueError(expected(what, repr(given), "convert"))
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    root = copy.deepcopy(model)
    programs = trace(root, inputs, leaf_modules)
    structure = find_structure(root, programs, Policy(residual, grouped))
    skeletons = copy.deepcopy(model).to("meta"), copy.deepcopy(root).to("meta")
    way: Execution = SparseExecution() if execution == "sparse" else MaskExecution()
    shapes = [tuple(x.shape) for x in inputs]
    converted = ChannelModel(root, skeletons, structure, way, shapes)
    converted.saliency_reduction = saliency
    return converted


def revert(model: ChannelModel) -> nn.Module:
    """Return the original architecture with the full weights, as a copy.

    Raises:
        TypeError: if ``model`` was not made by `convert`.
    """
    if not isinstance(model, ChannelModel):
        raise TypeError(expected("a model made by convert", type(model).__name__, "revert"))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return model.fill(model.skeleton(), state)
