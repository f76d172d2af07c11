"""The GPU benchmarks without a GPU: reference kernels, tiny shapes, the host's clock."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_bench, gpu_ops, gpu_step, gpu_tests
from benchmarks.gate import GateError
from benchmarks.gpu import Ceilings, GpuKey, current_key, require_gpu
from benchmarks.gpu_cases import TINY, Case, conv_cases, norm_cases, union_cases
from benchmarks.gpu_plan import (
    BROKEN,
    OUT_OF_TIME,
    Block,
    Budget,
    Progress,
    part_parser,
    run_plan,
    warm_share,
)
from benchmarks.gpu_plot import draw_ops, draw_steps
from benchmarks.gpu_smoke import CALLS, smoke_kernels
from benchmarks.gpu_table import geometric_mean, print_op_tables, print_step_table
from benchmarks.gpu_timer import HostTimer
from benchmarks.problem import Problem, on_grid
from benchmarks.rows import GpuOpRow, GpuStepRow, RowWriter, read_rows
from dcx_kernels.kernels import reference

(TINY_NAME, TINY_LAYER), *_ = TINY.items()
SETUP = gpu_step.Setup(Problem("vgg19", 3, 0.5, "NHWC", 1 / 16, grid="odd", dtype="bfloat16"))
CEILINGS = Ceilings(1000.0, 100.0)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Of every test here."""


@pytest.fixture(scope="module")
def key() -> GpuKey:
    return current_key("cpu")


# --- a plan ---------------------------------------------------------------------------------------


def _blocks(done: list[str], **errors: Exception) -> list[Block]:
    def block(name: str) -> Block:
        def run() -> list[str]:
            if name in errors:
                raise errors[name]
            done.append(name)
            return [f"note of {name}"] if name == "c" else []

        return Block(name, run, run)

    return [block(name) for name in "abcd"]


def test_a_block_that_fails_is_noted_and_the_others_run() -> None:
    done: list[str] = []
    progress = Progress()
    run_plan(_blocks(done, b=ValueError("no\n  luck")), Budget(1e9), progress)
    assert done == ["a", "c", "d"] and progress.running == ""
    assert progress.notes == ["b: ValueError: no luck", "note of c"]


def test_a_broken_gpu_ends_the_process_and_the_next_one_goes_on_behind(tmp_path: Path) -> None:
    done: list[str] = []
    path = tmp_path / "progress.json"
    blocks = _blocks(done, b=RuntimeError("CUDA error: an illegal memory access"))
    with pytest.raises(SystemExit) as left:
        run_plan(blocks, Budget(1e9), Progress(path))
    assert left.value.code == BROKEN and done == ["a"]
    again = Progress(path)
    assert again.next == 2 and "illegal memory access" in again.notes[0]
    run_plan(blocks, Budget(1e9), again)
    assert done == ["a", "c", "d"]
    with pytest.raises(SystemExit):
        warm_share(blocks, "1/2")
    warm_share(blocks, "0/2")
    assert done == ["a", "c", "d", "a", "c"]


def test_what_the_time_does_not_allow_is_named() -> None:
    done: list[str] = []
    times = iter([0.0, 1.0, 9.0, 11.0])
    progress = Progress()
    run_plan(_blocks(done), Budget(10.0, lambda: next(times)), progress)
    assert done == ["a", "b"]
    assert progress.notes == [f"{OUT_OF_TIME}, not measured: c, d"]


PART = """
import os, sys, time
from benchmarks.gpu_plan import Block, Budget, Progress, part_parser, run_plan
o = part_parser("fake", "", "x.csv").parse_args()
def run(name):
    if name == "dies": os._exit(11)
    if name == "hangs": time.sleep(60)
    with o.out.open("a") as file: file.write(name + " ")
    return []
names = ["first", "dies", "hangs", "last"]
blocks = [Block(name, lambda name=name: run(name), None) for name in names]
run_plan(blocks, Budget(o.seconds), Progress(o.progress))
"""


def test_a_part_is_started_again_behind_what_killed_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fake_part.py").write_text(PART)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu_bench, "_HANGS", 2.0)
    part, out = gpu_bench.Part("fake_part", "x.csv", 1.0, 1), tmp_path / "x.csv"
    notes = gpu_bench.run_part(part, out, [], 60.0)
    assert out.read_text().split() == ["first", "last"]
    assert notes == [
        "dies: its process ended with status 11", "hangs: stopped: it took too long",
    ]  # fmt: skip
    (nothing,) = gpu_bench.run_part(part._replace(module="no_such_module"), out, [], 30.0)
    assert "ended early" in nothing


def test_options_of_the_parts() -> None:
    o = part_parser("x", "what", "a/b.csv").parse_args(["--tiny", "--warm", "1/3"])
    assert o.tiny and o.warm == "1/3" and o.out == Path("a/b.csv") and o.device == "cuda"


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for main in (gpu_bench.main, gpu_ops.main, gpu_step.main, gpu_tests.main):
        with pytest.raises(SystemExit, match=r"needs an NVIDIA GPU, and torch .* finds none\."):
            main([])
    with pytest.raises(SystemExit, match="make x needs"):
        require_gpu("make x")


# --- timing ---------------------------------------------------------------------------------------


def test_operators_interleave_and_are_prepared() -> None:
    calls: list[str] = []

    class Call:
        def __init__(self, name: str) -> None:
            self.name = name

        def prepare(self) -> None:
            calls.append(f"prepare {self.name}")

        def __call__(self) -> None:
            calls.append(self.name)

    found = HostTimer().time([Call("a"), lambda: calls.append("b")], rounds=4, warmup=1)
    assert [len(samples.device) for samples in found] == [4, 4]
    assert calls.count("a") == calls.count("b") == calls.count("prepare a") == 5
    assert all(calls[i - 1] == "prepare a" for i, name in enumerate(calls) if name == "a")
    order = [name for name in calls if not name.startswith("prepare")]
    assert len({tuple(order[i : i + 2]) for i in range(0, 10, 2)}) == 2


def test_ceilings_bound_the_time_from_both_sides() -> None:
    assert CEILINGS.bound_us(macs=10**9, moved=0) == pytest.approx(20.0)
    assert CEILINGS.bound_us(macs=10**9, moved=10**8) == pytest.approx(100.0)
    measured = Ceilings.measure(HostTimer(), "cpu", torch.float32, tiny=True)
    assert measured.copy_gb_per_s > 0 and measured.matmul_tflop_per_s > 0


# --- operators ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "grid", "expected"), [
    (32, "exact", 32), (19.2, "exact", 19), (19.2, "aligned", 16), (61, "aligned", 64),
    (3, "aligned", 8), (32, "odd", 31), (33, "odd", 33), (0.2, "odd", 1), (0.2, "exact", 1),
])  # fmt: skip
def test_widths_lie_on_their_grid(width: float, grid: str, expected: int) -> None:
    assert on_grid(width, 64, grid) == expected
    assert 1 <= on_grid(width, 4, grid) <= 4
    assert on_grid(60, 60, "aligned") == 60


def _cases() -> Iterator[Case]:
    for make in (conv_cases, norm_cases, union_cases):
        yield from make(TINY_NAME, TINY_LAYER, 0.5, "odd", "cpu", torch.float32)


def test_every_arm_of_every_operator_is_right(key: GpuKey) -> None:
    seen = {}
    for case in _cases():
        errors, notes = gpu_ops.check_case(case)
        assert notes == [] and set(errors) == set(case.arms)
        assert all((error is None) == (arm in case.unchecked) for arm, error in errors.items())
        rows = list(gpu_ops.measure_case(case, case.arms, errors, 2, 0, HostTimer(), CEILINGS, key))
        seen[case.op] = rows
        assert [row.arm for row in rows] == list(case.arms)
        base = next(row for row in rows if row.arm == case.baseline)
        assert base.over_torch == 1.0 and base.roofline is not None
    conv = seen["conv_fwd"][0]
    pixels = 3 * 3
    assert (conv.c_in, conv.c_out) == (5, 7)
    flops = 2 * 2 * pixels * 5 * 7 * 9
    assert conv.tflop_per_s == pytest.approx(1e-6 * flops / conv.median_us)
    moved = 4 * (2 * 5 * 36 + 2 * 7 * pixels + 5 * 7 * 9)
    assert conv.gb_per_s == pytest.approx(1e-3 * moved / conv.median_us)


@pytest.mark.parametrize(
    ("kernel", "wrong"),
    [
        ("channel_conv2d_wgrad", lambda dw: dw * 1.001),
        ("channel_conv2d_fwd", lambda y: torch.full_like(y, torch.nan)),
        ("channel_conv2d_dgrad", lambda dx: dx[:, :-1]),
        ("channel_batch_norm_bwd", lambda grads: (grads[0] * 1.001, *grads[1:])),
        ("channel_batch_norm_fwd", lambda out: (out[0].roll(1, 1), *out[1:])),
    ],
)
def test_a_wrong_arm_is_left_out(
    monkeypatch: pytest.MonkeyPatch, kernel: str, wrong: Callable[[Any], Any]
) -> None:
    right = getattr(reference, kernel)
    monkeypatch.setattr(reference, kernel, lambda *args: wrong(right(*args)))
    op = kernel.removeprefix("channel_").replace("conv2d", "conv")
    case = next(case for case in _cases() if case.op == op)
    errors, notes = gpu_ops.check_case(case)
    assert "own" not in errors and case.baseline in errors
    assert any(note.startswith(f"{case.name}: own left out: GateError") for note in notes)


def test_operators_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, progress = tmp_path / "ops.csv", tmp_path / "progress.json"
    gpu_ops.main(
        ["--device", "cpu", "--tiny", "--out", str(path), "--progress", str(progress),
         "--commit", "abc"]
    )  # fmt: skip
    assert Progress(progress).notes == []
    rows = read_rows(path, GpuOpRow)
    assert {row.op for row in rows} == {
        "conv_fwd", "conv_dgrad", "conv_wgrad", "batch_norm_fwd", "batch_norm_bwd", "union_add",
        "gather_slices", "sgd_step", "selection",
    }  # fmt: skip
    assert {row.widths for row in rows} == {"full", "aligned", "odd"}
    assert draw_ops(path).stat().st_size > 10_000
    capsys.readouterr()
    print_op_tables(rows)
    assert len(capsys.readouterr().out) < 12_000
    print_op_tables([])
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0) and geometric_mean([]) is None


# --- steps ----------------------------------------------------------------------------------------


def _right(problem: Any, sets: Any) -> None:
    """Stand in for the gate, which has tests of its own."""


def test_a_step_in_every_arm(
    key: GpuKey, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checked = []

    def gate(problem: Problem, sets: Any) -> None:
        checked.append((problem.batch, problem.extent, len(sets)))

    arms = (*gpu_step.USUAL, "sparse_own")
    setup = replace(SETUP, arms=arms, regimes=("fixed", "varying"))
    rows = gpu_step.measure_block(setup, HostTimer(), key, 1, 1, gate)
    assert checked == [(3, 32, 2)] * 2  # the default and the forced one
    twice = ("thin", "sparse", "sparse_own")
    assert [(row.arm, row.regime) for row in rows] == [("dense", "any"), ("mask", "any")] + [
        (arm, regime) for arm in twice for regime in ("fixed", "varying")
    ]
    for row in rows:
        ours = row.arm.startswith("sparse")
        assert row.step_ms > 0 and row.host_ms > 0 and row.saved_bytes > 0
        assert (row.sparse_over_thin is not None) == ours == (row.host_over_thin is not None)
        assert row.cudnn_benchmark == (row.regime != "varying")
        assert row.dtype == "bfloat16" and row.widths == "odd"
    assert all(row.off_grid == row.groups for row in rows if row.regime == "fixed")
    path = tmp_path / "steps.csv"
    with RowWriter(path, GpuStepRow) as writer:
        for row in rows:
            writer.write(row)
    assert [row.arm for row in read_rows(path, GpuStepRow)] == [row.arm for row in rows]
    assert draw_steps(path).stat().st_size > 10_000
    print_step_table(rows)
    assert "sparse_own" in capsys.readouterr().out


def test_the_compiled_arm_is_a_thin_one(key: GpuKey) -> None:
    setup = replace(SETUP, arms=("thin", "compiled"))
    thin, compiled = gpu_step.measure_block(setup, HostTimer(), key, 1, 0, _right)
    assert (compiled.arm, compiled.macs) == ("compiled", thin.macs) and compiled.step_ms > 0
    assert compiled.sparse_over_thin is None


def test_a_wrong_step_is_not_timed(key: GpuKey, monkeypatch: pytest.MonkeyPatch) -> None:
    def red(problem: Problem, sets: Any) -> None:
        raise GateError("wrong")

    timer = HostTimer()
    monkeypatch.setattr(timer, "steps", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(GateError):
        gpu_step.measure_block(SETUP, timer, key, 1, 0, red)


def test_the_most_important_steps_come_first_and_none_twice() -> None:
    chosen = list(gpu_step.setups("cuda", tiny=False))
    assert len(set(chosen)) == len(chosen)
    first = chosen[:7]
    assert {s.problem.model for s in first} == {"vgg19", "resnet18", "resnet50", "densenet121"}
    assert {s.problem.residual for s in first} == {"keep", "tie"}
    assert {s.problem.density for s in chosen} == {0.25, 0.3, 0.5, 0.75, 1.0}
    for setup in chosen:
        assert setup.problem.dtype == "bfloat16" and setup.problem.device == "cuda"
        assert setup.problem.density < 1 or setup.problem.grid == "aligned"


# --- tests and the sanitizer ----------------------------------------------------------------------


def test_smoke_calls_what_it_should_and_sees_a_wrong_kernel() -> None:
    assert smoke_kernels("cpu") == 8 * len(CALLS)

    class Wrong:
        def __getattr__(self, name: str) -> Any:
            if name == "union_add":
                return lambda *args: reference.union_add(*args).roll(1, 1)
            return getattr(reference, name)

    with pytest.raises(AssertionError, match="union_add"):
        smoke_kernels("cpu", Wrong())  # type: ignore[arg-type]


def test_tests_run_in_parallel_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tests, "_installed", lambda module: True)
    command = gpu_tests.tests_command(4)
    assert command[command.index("-n") + 1] == "4" and "benchmarks.gpu_tests" in command
    assert command[0] == sys.executable
    assert "-n" not in gpu_tests.tests_command(1)
    monkeypatch.setattr(gpu_tests, "_installed", lambda module: False)
    assert "-n" not in gpu_tests.tests_command(4)


def test_files_without_a_gpu_test_are_not_imported() -> None:
    tests = Path(__file__).parents[1]
    ignored = gpu_tests.pytest_ignore_collect
    assert ignored(tests / "benchmarks" / "test_harness.py") is True
    assert ignored(tests / "benchmarks" / "test_gpu_training.py") is None
    assert ignored(tests / "kernels" / "triton" / "test_anything.py") is None
    assert ignored(tests / "conftest.py") is None


def test_the_plugin_imports_neither_torch_nor_triton() -> None:
    """The tests' conftest decides whether triton is interpreted, and runs later."""
    check = "import sys, benchmarks.gpu_tests; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=gpu_tests.ROOT).returncode == 0


def test_sanitizer_commands(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    commands = gpu_tests.sanitizer_commands("compute-sanitizer")
    assert [command[2] for command in commands] == ["memcheck", "racecheck", "initcheck"]
    assert ["--networks" in command for command in commands] == [True, False, False]
    monkeypatch.setattr(gpu_tests.shutil, "which", lambda name: None)
    assert gpu_tests._sanitize(10.0) is False
    assert "not on the PATH" in capsys.readouterr().out
