"""Tracing a model twice, as it trains and as it evaluates, with the shape of every value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = ["Program", "trace"]


class Program(NamedTuple):
    """One traced graph and the shape of each of its tensor-valued nodes, by node name."""

    graph: fx.Graph
    shapes: dict[str, tuple[int, ...]]

    def output_pixels(self) -> dict[str, int]:
        """Return P * Q of each module's output (1 for features), summed over its calls, by name."""
        pixels: dict[str, int] = {}
        for node in self.graph.nodes:
            if node.op == "call_module" and node.name in self.shapes:
                name, area = str(node.target), torch.Size(self.shapes[node.name][2:]).numel()
                pixels[name] = pixels.get(name, 0) + area
        return pixels


def trace(model: nn.Module, example_inputs: Sequence[Tensor]) -> dict[bool, Program]:
    """Trace ``model`` in training mode (key True) and in evaluation mode (key False).

    torch.fx bakes ``self.training`` into a graph, so one graph cannot serve both. The model is left
    in its mode, and nothing is computed: shapes come from fake tensors.

    Raises:
        ValueError: if the model cannot be traced; the message says where and what to do.
    """
    return {training: _trace_one(model, training, example_inputs) for training in (True, False)}


def _trace_one(model: nn.Module, training: bool, example_inputs: Sequence[Tensor]) -> Program:
    with _mode(model, training):
        try:
            graph = fx.Tracer().trace(model)
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot be traced by torch.fx: {error}. Its forward "
                "depends on values of tensors; move that part into a module of its own that fx "
                "keeps whole, or convert the traceable submodules one by one."
            ) from error
    with _mode(model, False):  # batch norm refuses a single value per channel in training
        shapes = _ShapeRecorder(model, graph).record(example_inputs)
    return Program(graph, shapes)


class _ShapeRecorder(fx.Interpreter):
    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, garbage_collect_values=True, graph=graph)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n.name] = tuple(value.shape)
        return value

    def record(self, example_inputs: Sequence[Tensor]) -> dict[str, tuple[int, ...]]:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode, torch.no_grad():
            self.run(*[mode.from_tensor(x) for x in example_inputs])
        return self.shapes


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put every module into one mode, and back into its own."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode
