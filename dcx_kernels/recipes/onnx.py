"""A thin network as one ONNX file, checked against PyTorch where onnxruntime is installed."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dcx_kernels.train.atomic import replace_file

__all__ = ["export_onnx", "missing_packages"]

_TOLERANCE = 1e-4
_STAR_ARGS = "VAR_POSITIONAL"


def missing_packages() -> list[str]:
    """Return the packages that the export needs and that are not installed."""
    return [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]


def export_onnx(model: nn.Module, example: Tensor, path: Path) -> str:
    """Write ``model`` in eval mode to one ONNX file with a dynamic batch.

    Args:
        model: a plain network.
        example: images of the right size, shape (N, C, H, W).
        path: the file to create or replace.

    Returns:
        A sentence on how it was checked.

    Raises:
        ValueError: if a package is missing, or onnxruntime disagrees with PyTorch.
    """
    if missing := missing_packages():
        raise ValueError(
            f"ONNX export needs {' and '.join(missing)}: pip install 'dcx-kernels[onnx]'"
        )
    model = copy.deepcopy(model).cpu().eval()
    images = example.detach().cpu().contiguous().expand(2, *example.shape[1:]).contiguous()
    shapes: tuple[object, ...] = ({0: torch.export.Dim("batch", min=1)},)
    if next(iter(inspect.signature(model.forward).parameters.values())).kind.name == _STAR_ARGS:
        shapes = (shapes,)  # torch.export counts *args as one argument, a tuple
    checked = ""

    def write(temporary: Path) -> None:
        nonlocal checked
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside the exporter, none of ours
            torch.onnx.export(
                model,
                (images,),
                str(temporary),
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=shapes,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        checked = _check(model, images, temporary)

    replace_file(path, write)
    return checked


def _check(model: Callable[[Tensor], Tensor], images: Tensor, path: Path) -> str:
    if importlib.util.find_spec("onnxruntime") is None:
        return "not checked: onnxruntime is not installed"
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    three = torch.cat([images, images[:1] * 0.5])  # another batch size than it was traced with
    with torch.no_grad():
        wanted = model(three)
    got = torch.from_numpy(session.run(None, {"images": three.numpy()})[0])
    error = float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
    if not error <= _TOLERANCE:
        raise ValueError(f"onnxruntime disagrees with PyTorch by {error:.1e} of the largest logit")
    return f"onnxruntime agrees with PyTorch to {error:.1e}"
