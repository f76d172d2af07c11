"""What moves channels to other places: flatten, view, transpose, slices, chunks, padding."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from dcx_kernels.graph.layout import ABSENT, Ids, Layout
from dcx_kernels.graph.rules.elementwise import per_channel
from dcx_kernels.graph.walk import Count, Flatten, Fold, Rule, Select, Sizes, Value, Walk

__all__ = ["FUNCTIONS", "METHODS", "MODULES", "sizes_of"]


def _reshape(walk: Walk, node: fx.Node) -> Value:
    """flatten, view, reshape, unflatten: read off the dense shapes before and after.

    Understood: merging channels and pixels into features; spreading channels over several dims, as
    a channel shuffle does; gathering them again. Batch and other dims stay as they are.
    """
    source = node.args[0]
    value, before, after = walk.value(source), walk.shape(source), walk.shape(node)
    if isinstance(value, Layout):
        value = walk.layout(source)
    if not isinstance(value, (Layout, Fold)) or before is None or after is None or not after:
        return walk.unusual(node)
    if isinstance(value, Layout) and after[:2] == before[:2]:
        return _apart(walk, node, value)
    spread = value.positions.ndim if isinstance(value, Fold) else 1
    count, pixels, dims = math.prod(before[1 : 1 + spread]), before[1 + spread :], after[1:]
    if after[0] == before[0]:
        if isinstance(value, Layout) and len(dims) == 1 and dims[0] == math.prod(before[1:]):
            assert isinstance(source, fx.Node)
            walk.steps[node] = Flatten(source, value)
            return Layout(value.ids, value.inner * math.prod(pixels))
        channels = dims[: len(dims) - len(pixels)]
        if dims[len(channels) :] == pixels and math.prod(channels) == count:
            if isinstance(value, Layout) and value.inner == 1:
                assert isinstance(source, fx.Node)
                value = Fold(source, value, np.arange(len(value)))
            if isinstance(value, Fold):
                return _unfold(walk, node, value, value.positions.reshape(channels))
    walk.keep_inputs(node, f"{walk.describe(node)} mixes channels with other dims")
    return None


def _apart(walk: Walk, node: fx.Node, layout: Layout) -> Value:
    """Rearrange pixels behind the channels: view(n, c, 1, 1), view(n, c, -1), flatten(2)."""
    source, sizes = node.args[0], sizes_of(node)
    assert isinstance(source, fx.Node)
    if layout.inner == 1 and not sizes:
        return layout
    pixels = all(walk.value(size) is None for size in (*sizes[:1], *sizes[2:]))
    if layout.inner == 1 and len(sizes) > 1 and pixels:
        count = walk.value(sizes[1])
        own = isinstance(count, Count) and count.exact and _same(walk, count.layout, layout)
        if own or sizes[1] == -1:
            return layout
        walk.steps[node] = Flatten(source, layout, apart=True)
        return layout
    return walk.unusual(node)


def sizes_of(node: fx.Node) -> tuple[Any, ...]:
    """Return the sizes that a view or reshape names; none for what needs none (flatten)."""
    if node.op == "call_module" or node.target not in ("view", "reshape", torch.reshape):
        return ()
    sizes = node.args[1:] or tuple(node.kwargs.values())
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes


def _same(walk: Walk, a: Layout, b: Layout) -> bool:
    return np.array_equal(walk.layout_of(a).ids, walk.layout_of(b).ids)


def _around_channels(walk: Walk, node: fx.Node) -> Value:
    """Rearrange pixels only, without a word on batch and channels: squeeze(3)."""
    layout, before, after = walk.layout(node.args[0]), walk.shape(node.args[0]), walk.shape(node)
    dims = [*node.args[1:], *node.kwargs.values()]
    plain = bool(dims) and all(isinstance(d, int) and d not in (0, 1) for d in dims)
    if layout is not None and before and after and plain and after[:2] == before[:2]:
        return layout
    return walk.unusual(node)


def _unfold(walk: Walk, node: fx.Node, fold: Fold, positions: Ids) -> Value:
    """Channels in one dim again are a selection of the source's."""
    if positions.ndim > 1:
        return Fold(fold.source, fold.layout, positions)
    return _select(walk, node, fold.source, fold.layout, positions)


def _select(walk: Walk, node: fx.Node, source: fx.Node, layout: Layout, positions: Ids) -> Layout:
    if any(_changes_in_place(walk, user) for user in node.users):
        walk.keep(layout, "changed in place through a slice of it")
    ids = np.where(positions < 0, ABSENT, walk.table.resolve(layout.ids)[positions])
    out = Layout(ids, layout.inner)
    walk.steps[node] = Select(source, layout, positions, out)
    return out


def _changes_in_place(walk: Walk, node: fx.Node) -> bool:
    """Tell whether a node writes into its input: through a slice that reaches the whole."""
    if node.op == "call_module":
        return bool(getattr(walk.module(node), "inplace", False))
    name = getattr(node.target, "__name__", str(node.target))
    in_place = node.kwargs.get("inplace") or (name.endswith("_") and not name.endswith("__"))
    return bool(in_place) or node.target in (operator.iadd, operator.isub, operator.imul)


def _transpose(walk: Walk, node: fx.Node) -> Value:
    """Exchange two of the dims that channels are spread over."""
    fold, shape = walk.value(node.args[0]), walk.shape(node.args[0])
    dims = [d for d in node.args[1:3] if isinstance(d, int)]
    if shape is not None and len(dims) == 2:
        low, high = sorted(d % len(shape) - 1 for d in dims)
        if isinstance(fold, Layout) and low > 0:
            return walk.layout(node.args[0])  # pixels only
        if isinstance(fold, Fold) and low >= 0 and high < fold.positions.ndim:
            return Fold(fold.source, fold.layout, fold.positions.swapaxes(low, high))
    walk.keep_inputs(node, f"{walk.describe(node)} of channels and other dims")
    return None


def _permute(walk: Walk, node: fx.Node) -> Value:
    fold = walk.value(node.args[0])
    dims: Any = node.args[1:]
    if len(dims) == 1 and isinstance(dims[0], (list, tuple)):
        dims = dims[0]
    if isinstance(fold, Fold) and all(isinstance(d, int) for d in dims):
        order = [d % len(dims) for d in dims]
        spread = fold.positions.ndim
        inside = [d - 1 for d in order[1 : 1 + spread]]
        rest = list(range(1 + spread, len(order)))
        if sorted(inside) == list(range(spread)) and order[0] == 0 and order[1 + spread :] == rest:
            return Fold(fold.source, fold.layout, fold.positions.transpose(inside))
    walk.keep_inputs(node, f"{walk.describe(node)} of channels and other dims")
    return None


def _contiguous(walk: Walk, node: fx.Node) -> Value:
    value = walk.value(node.args[0])
    return value if isinstance(value, Fold) else per_channel(walk, node)


def _chunk(walk: Walk, node: fx.Node) -> Value:
    """Chunk and split: a tuple of slices; each getitem picks one."""
    layout, shape = walk.layout(node.args[0]), walk.shape(node.args[0])
    given = dict(zip(("size", "dim"), node.args[1:], strict=False)) | node.kwargs
    dim = given.pop("dim", 0)
    (size,) = list(given.values()) or [None]
    if layout is None or shape is None or not isinstance(dim, int) or layout.inner != 1:
        return walk.unusual(node)
    if dim % len(shape) >= 2 and isinstance(size, int):
        return (layout,) * _parts(node, shape[dim % len(shape)], size)
    sizes: list[Any] = list(size) if isinstance(size, (list, tuple)) else []
    if isinstance(size, int):
        length = -(-shape[1] // size) if "chunk" in walk.describe(node) else size
        sizes = [min(length, shape[1] - at) for at in range(0, shape[1], length)]
    known = all(isinstance(s, int) for s in sizes)
    if dim % len(shape) != 1 or not known or sum(sizes) != shape[1]:
        return walk.unusual(node)
    ends = np.cumsum(sizes)
    return tuple(Layout(layout.ids[end - s : end]) for s, end in zip(sizes, ends, strict=True))


def _parts(node: fx.Node, extent: int, size: int) -> int:
    return size if "chunk" in str(node.target) else -(-extent // size)


def _getitem(walk: Walk, node: fx.Node) -> Value:
    """An item of sizes, a part of a chunk, a slice of a tensor."""
    source, index = node.args
    value = walk.value(source)
    if isinstance(value, Sizes):
        return _item_of_sizes(walk, node, value, index)
    if isinstance(value, tuple) and isinstance(index, int) and not isinstance(value, Count):
        return _part(walk, node, value, index)
    if isinstance(value, Layout):
        return _slice(walk, node, index)
    return walk.unusual(node)


def _item_of_sizes(walk: Walk, node: fx.Node, sizes: Sizes, index: Any) -> Value:
    shape = walk.shape(node.args[0].args[0]) if isinstance(node.args[0], fx.Node) else None
    if shape is not None and isinstance(index, (int, slice)):
        dims = range(len(shape))[index]
        if isinstance(dims, int):
            return Count(sizes.layout) if dims == 1 else None
        if 1 not in dims:
            return None
    walk.keep_inputs(node, "its channel count is used by the network")
    return None


def _part(walk: Walk, node: fx.Node, parts: tuple[Any, ...], index: int) -> Value:
    chunk = node.args[0]
    assert isinstance(chunk, fx.Node) and isinstance(chunk.args[0], fx.Node)
    source, part = chunk.args[0], parts[index]
    layout = walk.layout(source)
    if layout is None or part is None:
        return None
    if len(part) == len(layout):
        return layout  # a chunk along pixels
    start = sum(len(earlier) for earlier in parts[: index % len(parts)])
    return _select(walk, node, source, layout, np.arange(start, start + len(part)))


def _slice(walk: Walk, node: fx.Node, index: Any) -> Value:
    """x[:, a:b, ...]: slices of channels, slices and items of pixels; the batch stays whole."""
    source, shape = node.args[0], walk.shape(node.args[0])
    layout = walk.layout(source)
    index = index if isinstance(index, tuple) else (index,)
    if any(i is Ellipsis for i in index) and shape is not None:
        at = next(p for p, i in enumerate(index) if i is Ellipsis)
        whole = (slice(None),) * (len(shape) - sum(i is not None for i in index) + 1)
        index = (*index[:at], *whole, *index[at + 1 :])
    plain = all(isinstance(i, (slice, int, type(None))) and not _has_nodes(i) for i in index)
    if (
        layout is None
        or not plain
        or not index
        or index[0] != slice(None)
        or not isinstance((*index, slice(None))[1], slice)
        or layout.inner != 1
    ):
        walk.keep_inputs(node, f"no rule for this {walk.describe(node)}")
        return None
    if len(index) == 1 or index[1] == slice(None):
        return layout
    positions = np.arange(len(layout))[index[1]]
    if not len(positions):
        walk.keep_inputs(node, "a slice without channels")
        return None
    if len(index) > 2 and index[2:] != (slice(None),) * len(index[2:]):
        walk.keep_inputs(node, "a slice of channels and pixels at once")
        return None
    assert isinstance(source, fx.Node)
    return _select(walk, node, source, layout, positions)


def _has_nodes(index: Any) -> bool:
    parts = (index.start, index.stop, index.step) if isinstance(index, slice) else (index,)
    return any(isinstance(part, fx.Node) for part in parts)


_WITHOUT_SIZES = ("dim", "device", "dtype", "ndim", "is_cuda", "requires_grad")


def _sizes(walk: Walk, node: fx.Node) -> Value:
    """x.size(), x.size(0), x.shape, x.dim(), x.device, x.dtype: only the channel count matters."""
    layout = walk.layout(node.args[0])
    attribute = node.args[1] if node.target is getattr else node.target
    if layout is None:
        return walk.unusual(node)
    if attribute in _WITHOUT_SIZES:
        return None
    if attribute == "size" and len(node.args) > 1:
        shape, dim = walk.shape(node.args[0]), node.args[1]
        is_count = not isinstance(dim, int) or shape is None or dim % len(shape) == 1
        return Count(layout) if is_count else None
    if attribute in ("shape", "size"):
        return Sizes(layout)
    walk.keep_inputs(node, f"no rule for .{attribute}")
    return None


def _pad(walk: Walk, node: fx.Node) -> Value:
    """Pad pixels, or channels."""
    x, pads = node.args[0], node.kwargs.get("pad", node.args[1] if len(node.args) > 1 else None)
    shape = walk.shape(x)
    if shape is not None and isinstance(pads, (list, tuple)) and len(pads) <= 2 * len(shape) - 4:
        return per_channel(walk, node)
    return _pad_channels(walk, node, pads)


def _pad_channels(walk: Walk, node: fx.Node, pads: Any) -> Value:
    """Zero channels around others, as in the shortcuts of CIFAR ResNets; they are absent.

    A sum with them is a union; any other policy keeps what is padded full-width.
    """
    x = node.args[0]
    layout, shape = walk.layout(x), walk.shape(x)
    given = dict(zip(("mode", "value"), node.args[2:], strict=False)) | node.kwargs
    zeros = given.get("mode", "constant") == "constant" and not given.get("value")
    if (
        walk.policy.residual != "union"
        or layout is None
        or shape is None
        or not zeros
        or not isinstance(pads, (list, tuple))
        or len(pads) != 2 * len(shape) - 2
        or any(pads[:-2])
        or layout.inner != 1
    ):
        walk.keep_inputs(node, "padded along channels")
        return None
    before, after = pads[-2:]
    positions = np.arange(-before, len(layout) + after)
    positions[positions >= len(layout)] = -1
    assert isinstance(x, fx.Node)
    return _select(walk, node, x, layout, np.maximum(positions, -1))


MODULES: dict[type, Rule] = {nn.Flatten: _reshape, nn.Unflatten: _reshape}
FUNCTIONS: dict[Any, Rule] = {
    torch.flatten: _reshape,
    torch.reshape: _reshape,
    torch.squeeze: _around_channels,
    torch.unsqueeze: _around_channels,
    torch.transpose: _transpose,
    torch.permute: _permute,
    torch.chunk: _chunk,
    torch.split: _chunk,
    operator.getitem: _getitem,
    getattr: _sizes,
    F.pad: _pad,
}
METHODS: dict[str, Rule] = {
    **dict.fromkeys(["flatten", "view", "reshape", "unflatten"], _reshape),
    **dict.fromkeys(["squeeze", "unsqueeze"], _around_channels),
    "transpose": _transpose,
    "permute": _permute,
    "contiguous": _contiguous,
    **dict.fromkeys(["chunk", "split"], _chunk),
    **dict.fromkeys(["size", "dim"], _sizes),
}
