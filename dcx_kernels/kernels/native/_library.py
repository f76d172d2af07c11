"""Loading the libraries: once, and with a sentence where one is not there."""

from __future__ import annotations

import functools
import json

import torch

from dcx_kernels._env import library_dir

__all__ = ["AGAIN", "load"]

AGAIN = (
    "To build it, install dcx_kernels again from its sources: pip install --no-build-isolation . "
    "(in a checkout: make native)"
)


@functools.cache
def load(library: str) -> str | None:
    """Load ``_C_<library>``; return None, or why it cannot be had and what helps.

    Args:
        library: "cpu", or "cuda", which needs the other one and a torch built for CUDA.
    """
    path = library_dir() / f"_C_{library}.abi3.so"
    if not path.is_file():
        return f"not built: {_why(library)}. {AGAIN}"
    if library == "cuda":
        if torch.version.cuda is None:
            return "this torch is built without CUDA"
        lacking = load("cpu")
        if lacking is not None:
            return lacking
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"does not load: {error.__cause__ or error}"
    return None


def _why(library: str) -> str:
    """Return the reason that the build wrote down."""
    record = library_dir() / "_build.json"
    if not record.is_file():
        return f"no library and no record of a build in {record.parent}"
    found = json.loads(record.read_text(encoding="utf-8")).get(library, {})
    return str(found.get("not built", "the library was removed since"))
