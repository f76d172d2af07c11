"""From a dense network to channel groups, a converted model, its cost, and a thin network."""

from dcx_kernels.graph.carry import compact_optimizer
from dcx_kernels.graph.compact import compact
from dcx_kernels.graph.compact_io import load_compact, save_compact
from dcx_kernels.graph.convert import convert, revert
from dcx_kernels.graph.cost import Cost, LayerCost, cost
from dcx_kernels.graph.fbs import FBSModel, convert_fbs
from dcx_kernels.graph.fbs_memory import GateCost, memory_access
from dcx_kernels.graph.fbs_prune import cut_unused
from dcx_kernels.graph.fbs_record import count_winners, watch_winners
from dcx_kernels.graph.groups import ChannelGroup
from dcx_kernels.graph.model import ChannelModel

__all__ = [
    "ChannelGroup",
    "ChannelModel",
    "Cost",
    "FBSModel",
    "GateCost",
    "LayerCost",
    "compact",
    "compact_optimizer",
    "convert",
    "convert_fbs",
    "cost",
    "count_winners",
    "cut_unused",
    "load_compact",
    "memory_access",
    "revert",
    "save_compact",
    "watch_winners",
]
