"""Tracing a model twice, as it trains and as it evaluates, with the shape of every value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dcx_kernels.errors import expected
from dcx_kernels.graph.functional import call_modules

__all__ = ["LEAF_MODULES", "LeafModules", "Program", "trace"]

LeafModules = Sequence["type[nn.Module] | str"]

# Modules whose forward torch.fx cannot follow, kept whole; by class or by qualified name. The
# channels that reach them stay full-width. A program may append its own.
LEAF_MODULES: list[type[nn.Module] | str] = [
    "timm.models.vgg.ConvMlp",  # resizes its input where that is too small
    "timm.layers.conv2d_same.Conv2dSame",  # pads by a rule of its input's size
    "timm.layers.pool2d_same.AvgPool2dSame",
    "timm.layers.pool2d_same.MaxPool2dSame",
    "timm.models.mobilevit.MobileVitBlock",
    "timm.models.mobilevit.MobileVitV2Block",
    "timm.models.efficientvit_mit.LiteMLA",
]


class Program(NamedTuple):
    """One traced graph.

    Attributes:
        graph: as torch.fx traced it, with functional forms of layers as modules.
        shapes: of each tensor-valued node, by its name.
        pixels: P * Q of each module's output (1 for features), summed over its calls, by name.
        macs: multiply-accumulates of one sample, as torch counts them.
    """

    graph: fx.Graph
    shapes: dict[str, tuple[int, ...]]
    pixels: dict[str, int]
    macs: int


def trace(
    model: nn.Module, inputs: Sequence[Tensor], leaf_modules: LeafModules = ()
) -> dict[bool, Program]:
    """Trace ``model`` in training mode (key True) and in evaluation mode (key False).

    torch.fx bakes ``self.training`` into a graph, so one graph cannot serve both. The model is left
    in its mode, and nothing is computed: shapes come from fake tensors.

    Args:
        model: a copy of the dense network; subclasses of torch layers may become these (see
            `functional`).
        inputs: only shapes and dtypes are read.
        leaf_modules: classes, or their qualified names, that are kept whole, besides those of
            ``torch.nn`` and `LEAF_MODULES`.

    Raises:
        ValueError: if the model cannot be traced or cannot run the inputs, or has hooks that a
            graph would lose; the message names the module and says what to do.
        TypeError: if an input is not a tensor.
    """
    tracer = _Tracer([*LEAF_MODULES, *leaf_modules])
    _refuse_lost_hooks(model, tracer)
    for x in inputs:
        if not isinstance(x, Tensor):
            raise TypeError(expected("tensors as example inputs", type(x).__name__, "convert"))
    graphs = {mode: _trace_one(model, mode, tracer) for mode in (True, False)}
    call_modules(model, graphs)
    return {mode: _measured(model, graph, inputs) for mode, graph in graphs.items()}


class _Tracer(fx.Tracer):
    """Remembers where it is, so that an error can name the module."""

    proxy_buffer_attributes = True  # a counter that forward moves must not move while tracing

    def __init__(self, leaves: LeafModules) -> None:
        super().__init__()
        self._leaves = {leaf if isinstance(leaf, str) else _qualified(leaf) for leaf in leaves}
        self.path: list[tuple[str, nn.Module]] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        mine = any(_qualified(kind) in self._leaves for kind in type(m).__mro__)
        return mine or bool(super().is_leaf_module(m, module_qualified_name))

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.path.append((self.path_of_module(m), m))
        value = super().call_module(m, forward, args, kwargs)
        self.path.pop()  # not on an error: then it says where
        return value


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _trace_one(model: nn.Module, training: bool, tracer: _Tracer) -> fx.Graph:
    tracer.path.clear()
    with _mode(model, training):
        try:
            return tracer.trace(model)
        except Exception as error:
            name, module = tracer.path[-1] if tracer.path else ("the model", model)
            kind = type(module).__name__
            raise ValueError(
                f"{type(model).__name__} cannot be traced by torch.fx: {error} (in {name}, "
                f"a {kind}). Its forward depends on values or shapes of tensors. Keep that module "
                f"whole with leaf_modules=({kind},), or move the dependent part into a module of "
                "its own and keep that whole."
            ) from error


def _refuse_lost_hooks(model: nn.Module, tracer: _Tracer) -> None:
    """Refuse hooks of modules that a graph dissolves into their parts."""
    for name, module in model.named_modules():
        if name and tracer.is_leaf_module(module, name):
            continue
        for kind in ("forward_pre", "forward", "backward_pre", "backward"):
            if getattr(module, f"_{kind}_hooks"):
                where = f"{type(module).__name__} {name}".rstrip()
                raise ValueError(
                    f"{where}: expected no hooks on a container (its forward is dissolved into a "
                    f"graph, and they would never run), got a {kind} hook. Remove it, put it on a "
                    f"layer, or keep the module whole with leaf_modules=({type(module).__name__},)."
                )


class _ShapeRecorder(fx.Interpreter):
    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, garbage_collect_values=True, graph=graph)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.at = type(model).__name__  # the layer under way, for errors
        self.pixels: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n.name] = tuple(value.shape)
            if n.op == "call_module":
                name = str(n.target)
                last = isinstance(self.fetch_attr(name), nn.Linear)  # its channels are the last dim
                pixels = (value.shape[1:-1] if last else value.shape[2:]).numel()
                self.pixels[name] = self.pixels.get(name, 0) + pixels
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.at = str(target)
        if isinstance(self.fetch_attr(target), nn.BatchNorm2d) and args:
            return args[0]  # of the same shape; computing it takes longer than all other shapes
        return super().call_module(target, args, kwargs)


def _measured(model: nn.Module, graph: fx.Graph, inputs: Sequence[Tensor]) -> Program:
    recorder, counter = _ShapeRecorder(model, graph), FlopCounterMode(display=False)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with _mode(model, False), fake, torch.no_grad():  # in training a norm refuses single values
        images = [fake.from_tensor(x) for x in inputs]
        try:
            with counter:
                recorder.run(*images)
        except Exception as error:
            what = f"example inputs that {type(model).__name__} can run"
            got = f"shapes {[tuple(x.shape) for x in inputs]}: {str(error).splitlines()[0]}"
            raise ValueError(expected(what, got, recorder.at)) from error
    samples = max(1, inputs[0].shape[0] if inputs else 1)
    macs = counter.get_total_flops() // 2 // samples
    return Program(graph, recorder.shapes, recorder.pixels, macs)


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
