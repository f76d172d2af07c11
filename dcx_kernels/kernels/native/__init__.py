"""Kernels of csrc: compiled libraries whose operators stand under ``torch.ops.dcx_native``.

`cpu` and `cuda` are backends: import one only after `load` has said that its library is there.
"""

from dcx_kernels.kernels.native._library import AGAIN, load

__all__ = ["AGAIN", "load"]
