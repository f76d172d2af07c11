"""The benchmark harness on a tiny network. Nothing here asserts a time."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import train_step
from benchmarks.accounting import line_of, profile_arm
from benchmarks.arms import ARMS, SparseArm, ThinArm
from benchmarks.environment import Environment, current_environment
from benchmarks.gate import GateError, check_close, check_float32, check_training
from benchmarks.harness import PHASES, PhaseClock, Timing, measure, order_of_round, ratio
from benchmarks.plot import break_even
from benchmarks.problem import Problem, SetStream, Structure, equal_widths, vary_widths
from benchmarks.rows import RowWriter, StepRow, read_rows
from benchmarks.table import phase_shares, print_tables
from dcx_kernels.kernels.backend import choose

TINY = Problem("vgg19", batch=3, density=0.5, layout="NCHW", width=1 / 16)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Of every test here."""


@pytest.fixture(scope="module")
def structure() -> Structure:
    return Structure.of(TINY.converted("sparse"))


def _sets(structure: Structure, varying: bool, count: int = 2) -> list[Any]:
    stream = SetStream(structure, TINY.density, varying, seed=5)
    return [stream.fresh() for _ in range(count)]


def _row(**changes: Any) -> StepRow:
    environment = Environment(
        "cpu",
        "AVX2",
        2,
        2,
        "Linux x86_64",
        "3.11",
        "2.11.0",
        "0.1.0",
        "native",
        "abc",
        True,
        "2026-01-01",
    )
    row = StepRow(
        **asdict(environment), device="cpu", layout="NCHW", dtype="float32", batch=32,
        model="vgg19", density=0.5, regime="fixed", arm="sparse", groups=16, off_grid=0, rounds=20,
        step_ms=12.0, step_p20_ms=11.5, step_p80_ms=12.5, step_p99_ms=13.0, set_active_ms=1.0,
        zero_grad_ms=0.0, forward_ms=4.0, backward_ms=5.0, saliency_ms=0.5, optimizer_ms=1.0,
        macs=100, saved_bytes=1020, saved_weight_bytes=20,
    )  # fmt: skip
    return replace(row, **changes)


# --- the gate -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_gate_passes_what_is_right(structure: Structure, layout: str) -> None:
    check_training(replace(TINY, layout=layout), _sets(structure, varying=True))


@pytest.mark.parametrize(
    ("kernel", "wrong"),
    [
        ("channel_conv2d_wgrad", lambda dw: dw * 1.0001),
        ("channel_conv2d_dgrad", lambda dx: dx.roll(1, 1)),
        ("gather_slices", lambda parts: [part.flip(0) for part in parts]),
    ],
)
def test_gate_goes_red_on_a_wrong_kernel(
    structure: Structure, monkeypatch: pytest.MonkeyPatch, kernel: str, wrong: Any
) -> None:
    own = choose(torch.device("cpu"))
    right = getattr(own, kernel)
    monkeypatch.setattr(own, kernel, lambda *args, **kw: wrong(right(*args, **kw)))
    with pytest.raises(GateError, match="sparse and mask, float64"):
        check_training(TINY, _sets(structure, varying=False))


def test_gate_goes_red_on_a_wrong_thin_network(
    structure: Structure, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dcx_kernels as dcx

    right = dcx.compact

    def wrong(model: dcx.ChannelModel) -> torch.nn.Module:
        thin = right(model)
        with torch.no_grad():
            thin.classifier.weight.mul_(1.0001)
        return thin

    monkeypatch.setattr(dcx, "compact", wrong)
    with pytest.raises(GateError, match="thin and sparse"):
        check_training(TINY, _sets(structure, varying=False))


def test_check_close_compares_names_shapes_and_nan() -> None:
    one = {"a": torch.ones(3, dtype=torch.float64)}
    check_close(one, one, "x")
    for wrong in (
        {"b": one["a"]},
        {"a": torch.ones(2)},
        {"a": one["a"] * float("nan")},
        {"a": one["a"] * (1 + 1e-8)},
    ):
        with pytest.raises(GateError):
            check_close(wrong, one, "x")


def test_check_float32_allows_twice_torchs_error_and_no_more() -> None:
    truth = torch.ones(4, dtype=torch.float64)
    own = truth + 1e-3
    assert check_float32(truth + 1.9e-3, own, truth, "x") == pytest.approx(1.9e-3)
    with pytest.raises(GateError, match="x: error"):
        check_float32(truth + 2.1e-3, own, truth, "x")
    with pytest.raises(GateError):
        check_float32(truth + 2e-6, truth, truth, "x")


def test_a_red_gate_times_nothing(monkeypatch: pytest.MonkeyPatch, structure: Structure) -> None:
    def red(problem: Problem, sets: Any) -> None:
        raise GateError("wrong")

    monkeypatch.setattr(train_step, "measure", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(GateError):
        train_step.measure_block(TINY, list(ARMS), ["fixed"], current_environment(), 1, gate=red)


# --- widths and sets ------------------------------------------------------------------------------


def test_macs_are_those_that_cost_counts(structure: Structure) -> None:
    import dcx_kernels as dcx

    model = TINY.converted("sparse")
    model.set_active(_sets(structure, varying=True, count=1)[0])
    widths = {name: len(active) for name, active in model.active.items()}
    assert structure.macs(widths) == dcx.cost(model).macs


@pytest.mark.parametrize("density", [0.2, 0.5, 0.75, 0.9])
def test_varying_widths_do_the_same_arithmetic(density: float) -> None:
    wide = Structure.of(replace(TINY, width=0.25).converted("sparse"))
    generator = torch.Generator().manual_seed(0)
    target = wide.macs(equal_widths(wide, density))
    drawn = [vary_widths(wide, density, generator) for _ in range(4)]
    assert len({tuple(widths.values()) for widths in drawn}) == 4
    for widths in drawn:
        assert wide.macs(widths) == pytest.approx(target, rel=0.05)
        assert all(1 <= widths[name] <= c for name, c in wide.channels.items())


def test_fixed_sets_change_and_keep_their_widths(structure: Structure) -> None:
    first, second = _sets(structure, varying=False)
    assert {n: len(s) for n, s in first.items()} == {n: len(s) for n, s in second.items()}
    assert first != second
    for name, active in first.items():
        indices = active.indices
        assert (indices.diff() > 0).all() and active.num_channels == structure.channels[name]


def test_thin_runs_widths_only_after_sparse_has(structure: Structure) -> None:
    stream = SetStream(structure, TINY.density, varying=True, seed=1)
    sparse, thin = SparseArm(TINY, structure, stream), ThinArm(TINY, structure, stream)
    for _ in range(2):
        sparse.prepare()
        sparse.step(PhaseClock())
        thin.prepare()
        assert thin.widths == sparse.widths
        assert thin.model.features[0].out_channels == sparse.widths["features.0"]
        assert thin.macs() == sparse.macs()


# --- timing ---------------------------------------------------------------------------------------


class _Fake:
    regime = "any"
    needs_lead_in = True

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def prepare(self) -> None:
        time.sleep(0)

    def step(self, clock: PhaseClock) -> None:
        clock.start()
        self.calls.append(self.name)
        clock.lap("forward")


def test_rounds_interleave_every_arm_in_changing_order() -> None:
    calls: list[str] = []
    timings = measure([_Fake(name, calls) for name in "abc"], rounds=4, warmup=2, lead_in=1)
    assert [len(timing.steps) for timing in timings] == [4, 4, 4]
    turns = ["".join(calls[i : i + 6 : 2]) for i in range(0, len(calls), 6)]
    assert len(turns) == 6 and all(sorted(turn) == list("abc") for turn in turns)
    assert len(set(turns)) > 3
    orders = [tuple(order_of_round(3, number)) for number in range(6)]
    assert len(set(orders)) == 6


def test_timing_refuses_an_unknown_phase_and_adds_up() -> None:
    timing, clock = Timing(), PhaseClock()
    clock.ns = {"forward": 2_000_000, "backward": 3_000_000}
    timing.add(clock)
    assert timing.steps == [5.0] and timing.median == 5.0 and timing.phase("forward") == 2.0
    clock.ns["lunch"] = 1
    with pytest.raises(ValueError, match="lunch"):
        timing.add(clock)


# --- rows -----------------------------------------------------------------------------------------


def test_rows_round_trip(tmp_path: Path) -> None:
    rows = [_row(), _row(arm="thin", dirty=False, varying_over_fixed=1.25)]
    path = tmp_path / "results" / "rows.csv"
    with RowWriter(path, StepRow) as writer:
        writer.write(rows[0])
        assert read_rows(path, StepRow) == rows[:1]  # written when it is measured
    with RowWriter(path, StepRow, append=True) as writer:
        writer.write(rows[1])
    assert read_rows(path, StepRow) == rows
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns"):
        read_rows(path, StepRow)
    with pytest.raises(ValueError, match="columns"):
        RowWriter(path, StepRow, append=True)


def test_ratios_are_quotients_of_the_same_block() -> None:
    rows = [
        _row(arm="dense", regime="any", step_ms=48.0),
        _row(arm="mask", regime="any", step_ms=36.0),
        _row(arm="thin", regime="fixed", step_ms=10.0, saved_bytes=1000, saved_weight_bytes=0),
        _row(arm="sparse", regime="fixed", step_ms=12.0, saved_bytes=1020),
        _row(arm="thin", regime="varying", step_ms=16.0),
        _row(arm="sparse", regime="varying", step_ms=15.0),
    ]
    dense, _, thin, fixed, thin_varying, varying = train_step.add_ratios(rows)
    assert fixed.mask_over_sparse == 3.0 and fixed.dense_over_sparse == 4.0
    assert fixed.sparse_over_thin == 1.2 and fixed.saved_over_thin == 1.02
    assert fixed.saved_activations_over_thin == 1.0
    assert fixed.varying_over_fixed is None and varying.varying_over_fixed == 1.25
    assert varying.sparse_over_thin == 15 / 16 and thin_varying.varying_over_fixed == 1.6
    assert dense == rows[0] and thin == rows[2]
    (alone,) = train_step.add_ratios([rows[3]])
    assert alone == rows[3]
    assert ratio(None, 1.0) is None and ratio(1.0, None) is None


def test_phase_shares_account_for_the_whole_difference() -> None:
    thin = _row(arm="thin", step_ms=10.0, set_active_ms=0.0, saliency_ms=0.0, backward_ms=4.5)
    shares = phase_shares(_row(), thin)
    assert shares["set_active"] == pytest.approx(10) and shares["backward"] == pytest.approx(5)
    assert shares["total"] == pytest.approx(20) and shares["rest"] == pytest.approx(0)


def test_break_even_is_interpolated() -> None:
    ours = [(0.5, 5.0), (0.75, 8.0), (1.0, 12.0)]
    assert break_even(ours, [(d, 10.0) for d, _ in ours]) == pytest.approx(0.875)
    assert break_even(ours, [(d, 20.0) for d, _ in ours]) is None


# --- all of it ------------------------------------------------------------------------------------


def test_command_line_measures_every_arm_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.csv"
    train_step.main(
        ["--width", "0.0625", "--batch", "2", "--densities", "0.5,1.0", "--layouts", "NCHW",
         "--rounds", "2", "--warmup", "0", "--lead-in", "0", "--out", str(path)]
    )  # fmt: skip
    rows = read_rows(path, StepRow)
    arms = [(row.density, row.arm, row.regime) for row in rows]
    both = ["fixed", "varying"]
    assert sorted(arms) == sorted(
        [(d, arm, "any") for d in (0.5, 1.0) for arm in ("dense", "mask")]
        + [(0.5, arm, regime) for arm in ("thin", "sparse") for regime in both]
        + [(1.0, arm, "fixed") for arm in ("thin", "sparse")]
    )
    for row in rows:
        assert row.rounds == 2 and row.saved_bytes > 0 and row.macs > 0
        assert row.step_ms > 0 and all(getattr(row, f"{phase}_ms") >= 0 for phase in PHASES)
        assert (row.sparse_over_thin is not None) == (row.arm == "sparse")
        assert 0 <= row.saved_weight_bytes < row.saved_bytes
        assert (row.saved_weight_bytes > 0) == (row.arm == "sparse" and row.density < 1)
    dense = next(row for row in rows if row.arm == "dense")
    sparse = next(row for row in rows if row.arm == "sparse")
    assert sparse.macs < dense.macs and sparse.set_active_ms > 0 and dense.set_active_ms == 0
    assert str(tmp_path) not in path.read_text()
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert "Sparse minus thin" in capsys.readouterr().out
    print_tables([])


@pytest.mark.parametrize(
    "wrong", [["--densities", "0"], ["--densities", "1.5"], ["--arms", "magic"], ["--layouts", ""]]
)
def test_command_line_refuses_nonsense(wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        train_step.main(wrong)


def test_accounting_lines_add_up(structure: Structure) -> None:
    stream = SetStream(structure, TINY.density, varying=False, seed=1)
    lines = profile_arm(SparseArm(TINY, structure, stream), steps=1)
    assert lines["conv backward"] > 0 and lines["gather"] > 0 and lines["SGD update"] > 0
    assert line_of("aten::mkldnn_convolution") == "conv forward"
    assert line_of("aten::convolution_backward") == "conv backward"
    assert line_of("autograd::engine::evaluate_function: X") is None
