"""Average pooling to one pixel, as the mean that it is.

torch computes it as that mean, and then asks for the memory format of its input, which no graph of
torch.compile can tell that serves every number of channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

__all__ = ["pool_by_mean"]


def pool_by_mean(root: nn.Module, graphs: Mapping[bool, fx.Graph]) -> None:
    """Replace adaptive average pooling to 1 x 1."""
    modules = dict(root.named_modules(remove_duplicate=False))
    for graph in graphs.values():
        for node in list(graph.nodes):
            if not _one_pixel(_output_size(node, modules)):
                continue
            x = node.args[0] if node.args else node.kwargs["input"]
            with graph.inserting_before(node):
                mean = graph.call_function(torch.mean, (x, (-1, -2)), {"keepdim": True})
            node.replace_all_uses_with(mean)
            graph.erase_node(node)


def _output_size(node: fx.Node, modules: Mapping[str, nn.Module]) -> Any:
    if node.op == "call_module":
        module = modules[str(node.target)]
        return module.output_size if type(module) is nn.AdaptiveAvgPool2d else None
    if node.op == "call_function" and node.target is nn.functional.adaptive_avg_pool2d:
        return node.args[1] if len(node.args) > 1 else node.kwargs["output_size"]
    return None


def _one_pixel(size: Any) -> bool:
    return size == 1 or (isinstance(size, (tuple, list)) and tuple(size) == (1, 1))
