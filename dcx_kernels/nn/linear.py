"""`torch.nn.Linear` from active features to active features."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dcx_kernels.channel_set import ChannelSet
from dcx_kernels.errors import expected
from dcx_kernels.nn._adopt import adopt
from dcx_kernels.nn._channels import ChannelLayer
from dcx_kernels.ops.channel_linear import channel_linear
from dcx_kernels.ops.slot import ParameterSlot

__all__ = ["SparseChannelLinear"]


class SparseChannelLinear(ChannelLayer, nn.Linear):
    """`torch.nn.Linear` that reads active input channels and computes active outputs.

    Args:
        inner: features per input channel: the pixels of a flattened feature map.

    Shape:
        (..., c * inner) compact or (..., in_features) dense -> (..., len(out)).
    """

    _parameter_axes = {"weight": "out,in", "bias": "out"}  # noqa: RUF012

    def __init__(self, *args: Any, inner: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._init_channels()
        _check_inner(inner, self.in_features, type(self).__name__)
        self.inner = inner

    @classmethod
    def from_dense(cls, linear: nn.Linear, inner: int = 1) -> SparseChannelLinear:
        """Make a sparse layer that shares the parameters of ``linear``.

        Raises:
            TypeError: if ``linear`` is not exactly an `nn.Linear` (or already sparse).
            ValueError: if ``inner`` does not divide its features.
        """
        new = adopt(cls, linear, nn.Linear)
        _check_inner(inner, linear.in_features, "from_dense")
        new._init_channels()
        new.inner = inner
        return new

    def set_active(
        self, out: ChannelSet | None = None, in_: ChannelSet | None = None
    ) -> SparseChannelLinear:
        """Choose output and input channels of the next forward; None means all.

        Raises:
            ValueError: on a set of another size.
        """
        self._check_set(out, self.out_features, "out")
        self._check_set(in_, self.in_features // self.inner, "in_")
        self._set_sets(out, in_)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Apply the active slice of the layer."""
        made = self.operands(x)
        weight, bias = (made.weight, made.bias) if made.packed else (self.weight, self.bias)
        assert weight is not None
        try:
            return channel_linear(
                x, weight, bias, in_active=self.in_active, out_active=self.out_active,
                inner=self.inner, packed=made.packed,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{self.layer_name}: {error}") from None

    def _new_slot(self, name: str, parameter: nn.Parameter) -> ParameterSlot:
        return ParameterSlot(parameter, inner=self.inner if name == "weight" else 1)


def _check_inner(inner: int, features: int, where: str) -> None:
    if inner < 1 or features % inner:
        raise ValueError(expected(f"inner to divide {features} features", inner, where))
