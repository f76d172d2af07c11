"""A dataclass is a row of a CSV file, written the moment it is measured."""

from __future__ import annotations

import csv
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar, get_args, get_type_hints

from benchmarks.environment import Environment

__all__ = ["GpuOpRow", "GpuStepRow", "NativeRow", "OpRow", "RowWriter", "StepRow", "read_rows"]

R = TypeVar("R")


@dataclass(frozen=True)
class StepRow(Environment):
    """The training step of one arm; all times are medians in ms unless their name says otherwise.

    Args:
        regime: "fixed": new sets every step, fixed widths; "varying": new sets and never seen
            widths; "any": the arm does not care (dense, mask).
        off_grid: channel groups whose width is no multiple of 8, of ``groups``.
        macs: multiply-accumulates of one image's forward that are computed.
        saved_bytes: what autograd keeps between forward and backward, parameters apart.
        saved_weight_bytes: packed weights among them, which stand in for parameters of thin.
        mask_over_sparse, dense_over_sparse, sparse_over_thin: ratios of ``step_ms`` of the arms
            that were measured interleaved with this one; in rows of the sparse arm only.
        saved_over_thin: the same for ``saved_bytes``.
        saved_activations_over_thin: the same for ``saved_bytes - saved_weight_bytes``.
        varying_over_fixed: in rows of the varying regime.
    """

    device: str
    layout: str
    dtype: str
    batch: int
    model: str
    density: float
    regime: str
    arm: str
    groups: int
    off_grid: int
    rounds: int
    step_ms: float
    step_p20_ms: float
    step_p80_ms: float
    step_p99_ms: float
    set_active_ms: float
    zero_grad_ms: float
    forward_ms: float
    backward_ms: float
    saliency_ms: float
    optimizer_ms: float
    macs: int
    saved_bytes: int
    saved_weight_bytes: int
    mask_over_sparse: float | None = None
    dense_over_sparse: float | None = None
    sparse_over_thin: float | None = None
    saved_over_thin: float | None = None
    saved_activations_over_thin: float | None = None
    varying_over_fixed: float | None = None


@dataclass(frozen=True)
class OpRow(Environment):
    """One operator of one arm on one layer shape.

    Args:
        gflop_per_s: arithmetic that is needed at this density (not what the arm computes) over
            the median time; None where there is none to speak of.
        gb_per_s: bytes read and written over the median time, for memory-bound operators.
        error: relative to float64, of the checked result.
    """

    device: str
    layout: str
    dtype: str
    batch: int
    layer: str
    op: str
    density: float
    arm: str
    rounds: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    p99_ms: float
    gflop_per_s: float | None
    gb_per_s: float | None
    error: float | None


@dataclass(frozen=True)
class NativeRow(Environment):
    """One operator of the native library on one layer, fp32, on a CPU; medians in microseconds.

    Args:
        batch: images, or 0 where there are none.
        dense_us: of torch's own operator on all channels, where there is one.
    """

    op: str
    case: str
    layout: str
    batch: int
    rounds: int
    dense_us: float | None
    reference_us: float
    native_us: float
    reference_over_native: float
    dense_over_native: float | None


@dataclass(frozen=True)
class GpuOpRow(Environment):
    """One operator of one arm on one layer shape, on a GPU; times are in microseconds.

    Args:
        c_in, c_out: active channels of input and output.
        widths: "aligned": multiples of 8, "odd": odd ones, "full": all channels.
        median_us, p20_us, p80_us: of the device, between two events, with a cold L2 cache.
        host_us: what the call costs the host until it returns, median.
        tflop_per_s, gb_per_s: what is needed at this density (not what the arm computes or moves)
            over the median time; None where there is none to speak of.
        roofline: least time that ``copy_gb_per_s`` and ``matmul_tflop_per_s``, measured in the same
            run, allow for that, over the median time.
        over_torch: median time over that of torch's own operator (on compact tensors where it
            can), interleaved with it.
        error: relative to a more exact result, of the checked result.
    """

    gpu: str
    cuda: str
    driver: str
    triton: str
    copy_gb_per_s: float
    matmul_tflop_per_s: float
    layout: str
    dtype: str
    batch: int
    layer: str
    op: str
    density: float
    widths: str
    c_in: int
    c_out: int
    arm: str
    rounds: int
    median_us: float
    p20_us: float
    p80_us: float
    host_us: float
    tflop_per_s: float | None
    gb_per_s: float | None
    roofline: float | None
    over_torch: float | None
    error: float | None


@dataclass(frozen=True)
class GpuStepRow(StepRow):
    """The training step of one arm on a GPU: ``step_ms`` is the device's, phases are the host's.

    Args:
        widths: "aligned": multiples of 8, "odd": odd ones, "full": all channels.
        cudnn_benchmark: whether cuDNN was told to tune itself to the shapes.
        host_ms: until the host has issued the whole step to an idle device, median.
        peak_bytes: allocated at most during a step, weights and optimizer state included.
        host_over_thin, peak_over_thin: ratios of ``host_ms`` and ``peak_bytes``, in rows of the
            sparse arms only.
    """

    gpu: str = ""
    cuda: str = ""
    driver: str = ""
    triton: str = ""
    extent: int = 0
    widths: str = ""
    cudnn_benchmark: bool = False
    host_ms: float = 0.0
    peak_bytes: int = 0
    host_over_thin: float | None = None
    peak_over_thin: float | None = None


class RowWriter(Generic[R]):
    """Writes rows to a CSV file, flushed one by one: an interrupted run keeps what it measured.

    Args:
        path: the file; folders above it are made.
        kind: the dataclass.
        append: keep the rows of an earlier run.

    Raises:
        ValueError: when appending to a file with other columns.
    """

    def __init__(self, path: Path, kind: type[R], append: bool = False) -> None:
        names = _columns(kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        continued = append and path.exists() and path.stat().st_size > 0
        if continued:
            with path.open(newline="", encoding="utf-8") as file:
                found = next(csv.reader(file))
            if found != names:
                raise ValueError(f"expected the columns {names} in {path.name}, got {found}")
        self._file = path.open("a" if continued else "w", newline="", encoding="utf-8")
        self._csv = csv.writer(self._file, lineterminator="\n")
        if not continued:
            self._csv.writerow(names)
            self._file.flush()

    def write(self, row: R) -> None:
        """Write one row; times keep four significant decimals, None is an empty cell."""
        self._csv.writerow([_text(value) for value in astuple(row)])  # type: ignore[call-overload]
        self._file.flush()

    def __enter__(self) -> RowWriter[R]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


def read_rows(path: Path, kind: type[R]) -> list[R]:
    """Read what `RowWriter` wrote.

    Raises:
        ValueError: if the columns are not those of ``kind``.
    """
    hints = get_type_hints(kind)
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.DictReader(file)
        if lines.fieldnames is None or list(lines.fieldnames) != _columns(kind):
            what = f"expected the columns {_columns(kind)} in {path.name}"
            raise ValueError(f"{what}, got {lines.fieldnames}")
        return [kind(**{n: _value(t, hints[n]) for n, t in line.items()}) for line in lines]


def _columns(kind: type[Any]) -> list[str]:
    return [field.name for field in fields(kind)]


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(text: str, hint: Any) -> Any:
    if text == "" and type(None) in get_args(hint):
        return None
    kind = next((a for a in get_args(hint) if a is not type(None)), hint)
    return text == "True" if kind is bool else kind(text)
