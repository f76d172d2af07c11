"""Loading a state_dict of our own making."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ["load_assign"]


def load_assign(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give ``module`` the tensors of ``state`` themselves, as its own version of the format.

    A module may refuse a state_dict without the version it writes (torchvision's MNASNet does).

    Raises:
        RuntimeError: if names or shapes disagree.
    """
    versioned = OrderedDict(state)
    versioned._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    module.load_state_dict(versioned, assign=True)
