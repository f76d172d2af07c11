"""What the layers of a network read in a forward pass besides their input: made before it runs.

Packed leaves and probes are new tensors that autograd hands gradients to. A graph of torch.compile
can read such tensors, but cannot make them; so a network makes those of all its layers first.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Forward", "Operands", "Probe"]


class Probe:
    """Zeros that an operator is given so that their gradient is the saliency.

    Attributes:
        tensor: the zeros, (k,) or (N, k).
        pixels: P * Q of each call of the layer they were made for.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.pixels: list[int] = []

    def see(self, y: Tensor) -> None:
        """Note a call of the layer, whose output is y (N, k, P, Q)."""
        self.pixels.append(y.shape[2] * y.shape[3])


class Operands(NamedTuple):
    """What a forward of a layer reads: packed leaves, or (``packed`` False) its own parameters.

    ``groups``: groups of its convolution that exist, see `ops.grouping`.
    """

    packed: bool = False
    weight: Tensor | None = None
    bias: Tensor | None = None
    probe: Probe | None = None
    groups: int = 1


class Forward:
    """The forward pass under way in a network; its layers share it.

    Attributes:
        number: counts forward passes: meters know which of their sums belong together.
        operands: layer name -> what it reads; empty between forward passes.
    """

    def __init__(self) -> None:
        self.number = 0
        self.operands: dict[str, Operands] = {}
        self._hidden: list[tuple[Tensor, Tensor]] = []

    def begin(self, operands: dict[str, Operands]) -> None:
        """Start a forward pass that reads ``operands``.

        Gradients that leaves have of earlier micro-batches are out of sight until `end`: they would
        become a part of a graph that torch.compile makes now.
        """
        self.number += 1
        self.operands = operands
        for made in operands.values():
            for leaf in (made.weight, made.bias):
                if leaf is not None and leaf.grad is not None:
                    self._hidden.append((leaf, leaf.grad))
                    leaf.grad = None

    def end(self) -> None:
        """Forget the operands, however the pass ended."""
        self.operands = {}
        for leaf, grad in self._hidden:
            leaf.grad = grad
        self._hidden.clear()

    def __deepcopy__(self, memo: dict[int, object]) -> Forward:
        return memo.setdefault(id(self), Forward())  # type: ignore[return-value]
