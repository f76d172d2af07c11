"""From a dense network to channel groups, a converted model, its cost, and a thin network."""

from dcx_kernels.graph.carry import compact_optimizer
from dcx_kernels.graph.compact import compact
from dcx_kernels.graph.compact_io import load_compact, save_compact
from dcx_kernels.graph.convert import convert, revert
from dcx_kernels.graph.cost import Cost, LayerCost, cost
from dcx_kernels.graph.groups import ChannelGroup
from dcx_kernels.graph.model import ChannelModel

__all__ = [
    "ChannelGroup",
    "ChannelModel",
    "Cost",
    "LayerCost",
    "compact",
    "compact_optimizer",
    "convert",
    "cost",
    "load_compact",
    "revert",
    "save_compact",
]
