"""Studies: a target in a file of one's own, times, masked execution, and rows that two share."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dcx_kernels.cli import main
from dcx_kernels.data import load
from dcx_kernels.errors import DataError, NonFiniteError
from dcx_kernels.recipes import reproduce_recipes
from dcx_kernels.recipes.reproduce import Reproduction, reproduce
from dcx_kernels.recipes.reproduce_figures import figures
from dcx_kernels.recipes.reproduce_markdown import table_markdown
from dcx_kernels.recipes.reproduce_results import Results
from dcx_kernels.recipes.reproduce_scale import Options
from dcx_kernels.recipes.reproduce_table import cells_of, least_macs, runs_csv, title_of
from dcx_kernels.recipes.reproduce_target import Target, load_target
from dcx_kernels.recipes.reproduce_times import seconds_to, times
from dcx_kernels.recipes.run import Run
from dcx_kernels.train.log import Log

FILES = {"table.csv", "table.md", "runs.csv", "figure.png"}
STUDIES = sorted((Path(__file__).resolve().parents[2] / "results").glob("*/*.json"))
STUDY: dict[str, Any] = {
    "title": "Sparse against mask",
    "seeds": [0],
    "settings": {"epochs": 2, "batch_size": 16, "lr": 0.05},
    "scale": {"width": 1 / 8, "train_images": 48},
    "variants": {
        "dense": {"recipe": "dense"},
        "mask": {"recipe": "dce", "procedure": "single-stage", "execution": "mask"},
        "sparse": {"recipe": "dce", "procedure": "single-stage"},
    },
    "metrics": ["accuracy", "change", "macs", "step_ms", "faster", "train_s", "reach_s"],
    "reference": "dense",
    "reach": 20,
    "figure": "time",
    "entries": [
        {"data": "tiny", "model": "m_cifarnet", "variant": "dense", "density": 1.0},
        {"data": "tiny", "model": "m_cifarnet", "variant": "mask", "density": 0.5},
        {"data": "tiny", "model": "m_cifarnet", "variant": "sparse", "density": 0.5},
    ],
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "sparse-or-mask.json"
    path.write_text(json.dumps(STUDY))
    return path


@pytest.fixture(scope="module")
def found(
    study: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Reproduction]:
    directory = tmp_path_factory.mktemp("found")
    options = Options({"tiny": str(data_file)})
    return directory, reproduce(load_target(str(study)), options, directory)


def _changed(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({**STUDY, **changes}))
    return path


# the file


def test_a_study_is_a_target_with_the_name_of_its_file(study: Path) -> None:
    target = load_target(str(study))
    assert (target.name, target.config) == ("sparse-or-mask", "sparse-or-mask.json")
    assert (target.source, target.reach, target.whole) == ("", 20, (1, 3))
    assert load_target("dce-table1").config == "dce-table1.json"


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_studies_of_this_repository_can_be_read(path: Path) -> None:
    target = load_target(str(path))
    assert target.name == path.parent.name  # its results lie beside it
    assert len(target.seeds) >= 2
    Options({}).or_of(target)


def test_there_are_studies_in_this_repository() -> None:
    assert len(STUDIES) >= 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "a study, a JSON file, got"),
        ("[1]", "a JSON object, got list"),
        ('{"title": "x"}', "expected the keys"),
        (json.dumps({**STUDY, "speed": 1}), "and no others but"),
        (json.dumps({**STUDY, "reference": "thin"}), "a variant out of dense, mask, sparse, got"),
        (json.dumps({**STUDY, "scale": {"depth": 2}}), "a scale out of epochs, .*, got depth"),
        (json.dumps({**STUDY, "scale": {"width": 0}}), "a positive --width, got 0"),
    ],
    ids=str,
)
def test_wrong_studies_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Options({}).or_of(load_target(str(path)))


def test_a_study_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.json: .* got .*No such file"):
        load_target(str(tmp_path / "nowhere.json"))


def test_options_go_before_the_scale_of_the_file(study: Path) -> None:
    options = Options({}, width=0.5).or_of(load_target(str(study)))
    assert (options.width, options.train_images, options.epochs) == (0.5, 48, None)


def test_the_first_training_images_and_their_mean(data_file: Path) -> None:
    data = load(str(data_file))
    part = data.first(5)
    assert part.train_images.equal(data.train_images[:5])
    assert part.train_labels.equal(data.train_labels[:5])
    assert part.test_images is data.test_images
    pixels = part.train_images.double() / 255
    assert part.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    for count in (0, 65):
        with pytest.raises(DataError, match=f"1 to 64 training images, got {count}"):
            data.first(count)


# what it gives


def test_sparse_is_as_accurate_as_mask(found: tuple[Path, Reproduction]) -> None:
    """The same channels, batches and steps: what is not computed makes no difference."""
    _, mask, sparse = (rows[0] for rows in found[1].rows.values())
    assert mask["widths"] == sparse["widths"]
    assert mask["accuracy"] == sparse["accuracy"]
    assert [a for _, a in mask["curve"]] == [a for _, a in sparse["curve"]]
    assert mask["run"] != sparse["run"]
    assert mask["macs"] == mask["dense_macs"] > sparse["macs"]


def test_mask_is_masked_and_a_training_of_its_own(
    found: tuple[Path, Reproduction],
    study: Path,
    data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len(list((found[0] / "runs").iterdir())) == 3
    asked = []

    def convert(*arguments: Any, **options: Any) -> None:
        asked.append(arguments[3])
        raise NonFiniteError("enough")

    monkeypatch.setattr(reproduce_recipes, "convert", convert)
    target = load_target(str(study)).narrowed(variants=["mask", "sparse"])
    reproduce(target, Options({"tiny": str(data_file)}), tmp_path)
    assert asked == ["mask", "sparse"]


def test_title_and_rows_say_what_was_used(found: tuple[Path, Reproduction]) -> None:
    directory, result = found
    assert title_of(result).splitlines()[1] == (
        "SCALED DOWN: width x 0.125; 48 images of 4 classes for tiny; data: tiny from tiny.npz"
    )
    for row in Results(directory).rows().values():
        assert (row["config"], row["images"]) == ("sparse-or-mask.json", 48)
        assert row["steps"] == 2 * 3  # epochs of 48 images
    assert "curve" not in runs_csv(result).splitlines()[0]
    assert set(figures(result)) == {"figure.png"}


def test_times_are_in_the_table(found: tuple[Path, Reproduction]) -> None:
    dense, mask, sparse = (cells_of(found[1], entry) for entry in found[1].target.entries)
    rows = [rows[0] for rows in found[1].rows.values()]
    assert sparse["faster"].mean == pytest.approx(rows[0]["step_ms"] / rows[2]["step_ms"])
    assert dense["faster"].mean is None  # it is what the others are compared with
    assert sparse["train_s"].mean == rows[2]["train_s"] == rows[2]["curve"][-1][0]
    assert mask["reach_s"].mean in (None, *(seconds for seconds, _ in rows[1]["curve"]))


def test_without_scale_a_study_is_not_a_papers_recipe(
    found: tuple[Path, Reproduction], tmp_path: Path
) -> None:
    target = load_target(str(_changed(tmp_path / "whole.json", scale={})))
    assert "a study of its own" in title_of(Reproduction(target, [], {}))
    assert "the paper's recipe" in title_of(Reproduction(load_target("dce-table1"), [], {}))


def test_command(
    found: tuple[Path, Reproduction],
    study: Path,
    data_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["reproduce", str(study), "--data", str(data_file), "--out", str(found[0])]
    assert main([*arguments, "--threads", "1"]) == 0
    text = capsys.readouterr().out
    assert "3 trainings, 3 of them finished before" in text
    assert "paper" not in text
    folder = found[0] / "sparse-or-mask"
    assert {path.name for path in folder.iterdir()} == FILES
    assert main([*arguments, "--train-images", "65"]) == 2
    assert "1 to 64 training images, got 65" in capsys.readouterr().err


def test_markdown_says_what_how_and_who(found: tuple[Path, Reproduction]) -> None:
    text = table_markdown(found[1], ["figure.png"])
    assert text.startswith("# Sparse against mask\n\nSCALED DOWN: width x 0.125; 48 images")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0].startswith("| network | trained | density | seeds | accuracy % | change |")
    assert {line.count("|") for line in lines} == {4 + 7 + 1}
    sparse = [cell.strip() for cell in lines[-1].split("|")]
    (row,) = found[1].rows[found[1].target.entries[-1]]
    assert sparse[1:6] == ["m_cifarnet, tiny", "sparse", "0.5", "1", f"{100 * row['accuracy']:.2f}"]
    assert "![figure](figure.png)" in text
    assert f"3 trainings, 0.0 hours, on {row['machine']}, torch {row['torch']}, commit " in text
    assert "config sparse-or-mask.json" in text


def test_markdown_of_a_paper_has_its_numbers(data_file: Path) -> None:
    target = load_target("dce-table1").narrowed([0.4], ["vgg19"], ["two-stage"])
    text = table_markdown(Reproduction(target, [], {"cifar10": str(data_file)}))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert "| accuracy %, paper | accuracy %, ours | params, M, paper |" in lines[0]
    assert lines[2:] == [
        "| vgg19, cifar10 | two-stage | 0.4 | 0 | 92.02 | - | 2.890 | - | 132.00 | - |"
    ]
    assert "Paper: Spasov" in text and "- The paper counts norms" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ["accuracy", "fast"]}, "metrics out of accuracy, .*, got fast"),
        ({"figure": "tim"}, "a figure of density, .*, got tim"),
        ({"variants": {**STUDY["variants"], "mask": {"recipe": "dcf"}}}, "mask: .* got dcf"),
        ({"variants": {**STUDY["variants"], "mask": {}}}, "mask: a recipe out of .* got None"),
    ],
    ids=["metric", "figure", "recipe", "no recipe"],
)
def test_nothing_is_trained_that_cannot_be_shown(
    data_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    message: str,
) -> None:
    path, out = _changed(tmp_path / "wrong.json", **change), tmp_path / "out"
    assert main(["reproduce", str(path), "--data", str(data_file), "--out", str(out)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not out.exists()


# times of a log


def _run(directory: Path) -> Run:
    log = {"a": [(1000, None), (500, None), (None, 0.25), (250, None), (None, 0.75)], "b": []}
    log["b"] = [(4000, None), (None, 0.5)]
    run = Run(directory)
    for arm, rows in log.items():
        with Log(run.log_path, arm) as file:
            for step_ms, accuracy in rows:
                if accuracy is None:
                    file.write(kind="step", step_ms=step_ms)
                else:
                    file.write(kind="epoch", test_accuracy=accuracy, seconds=99)
    return run


def test_times_by_hand(tmp_path: Path) -> None:
    run = _run(tmp_path)
    assert times(run, ["a"]) == {
        "steps": 3,
        "step_ms": 500,
        "train_s": 1.75,
        "curve": [[1.5, 0.25], [1.75, 0.75]],
    }
    both = times(run, ["b", "a"])  # in this order
    assert both["curve"] == [[4.0, 0.5], [5.5, 0.25], [5.75, 0.75]]
    assert (both["steps"], both["step_ms"], both["train_s"]) == (4, 750, 5.75)
    assert times(run, ["c"]) == {"steps": 0, "step_ms": None, "train_s": 0, "curve": []}


def test_seconds_to_an_accuracy() -> None:
    row = {"curve": [[1.5, 0.25], [2.5, 0.75], [3.5, 0.5]]}
    found = [seconds_to(row, accuracy) for accuracy in (0.1, 0.25, 0.5, 0.75, 0.8, None)]
    assert found == [1.5, 1.5, 2.5, 2.5, None, None]
    assert seconds_to({}, 0.5) is None


# rows


def test_a_torn_line_does_not_take_the_next_one_with_it(tmp_path: Path) -> None:
    results = Results(tmp_path / "new")
    results.add({"run": "a", "accuracy": 1})
    with results.path.open("a") as file:
        file.write('{"run": "b", "accu')
    assert set(results.rows()) == {"a"}
    results.add({"run": "c"})
    results.add({"run": "a", "accuracy": 2})
    assert {key: row.get("accuracy") for key, row in results.rows().items()} == {"a": 2, "c": None}


def test_two_processes_may_share_the_file(tmp_path: Path) -> None:
    """Each looked at the rows before the other wrote: both rows stay."""
    one, other = Results(tmp_path), Results(tmp_path)
    assert one.rows() == other.rows() == {}
    one.add({"run": "a"})
    other.add({"run": "b"})
    assert set(one.rows()) == {"a", "b"}


def test_a_narrowed_study_says_so(study: Path) -> None:
    target: Target = load_target(str(study)).narrowed(variants=["mask"])
    assert (target.whole, len(target.entries)) == ((1, 3), 1)


@pytest.mark.parametrize(
    ("accuracies", "best"),
    [
        ({0.9: 91, 0.7: 90.5, 0.5: 89}, 0.7),  # at least, not above
        ({0.9: 80, 0.7: 92, 0.5: 91}, 0.5),
        ({0.9: 90.4, 0.7: 90, 0.5: 10}, None),
    ],
)
def test_least_macs_that_reach_an_accuracy(
    accuracies: dict[float, float], best: float | None
) -> None:
    target = load_target("fbs-figure3").narrowed(list(accuracies), variants=["baseline", "fbs"])
    found = Reproduction(target, [], {})
    for entry in target.entries:
        accuracy = accuracies.get(entry.density, 95) / 100  # the ordinary network's too
        row = {"seed": 0, "accuracy": accuracy, "macs": 1e8 * entry.density, "dense_macs": 1e8}
        if entry.density in accuracies or target.is_dense(entry):
            found.rows[entry] = [row]
    (line,) = least_macs(found).values()
    assert (line and line.density) == best
    assert least_macs(Reproduction(load_target("dce-table1"), [], {})) == {}


def test_a_table_that_is_wider_than_the_terminal_keeps_its_digits(
    found: tuple[Path, Reproduction],
    study: Path,
    data_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dcx_kernels.cli.reproduce.make_console", lambda: Console(width=40))
    arguments = ["reproduce", str(study), "--data", str(data_file), "--out", str(found[0])]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "\u2026" not in text
    (line,) = (line for line in text.splitlines() if line.startswith("   sparse "))
    (row,) = found[1].rows[found[1].target.entries[-1]]
    assert line.split()[1:4] == ["0.5", "1/1", f"{100 * row['accuracy']:.2f}"]


def test_command_prints_the_least_macs(
    data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"reach": 0, "seeds": [0], "settings": {**STUDY["settings"], "epochs": 1}}
    path = _changed(tmp_path / "some.json", **changes)
    arguments = ["reproduce", str(path), "--data", str(data_file), "--out", str(tmp_path)]
    assert main([*arguments, "--threads", "1", "--variants", "sparse"]) == 0
    text = capsys.readouterr().out
    assert "sparse of m_cifarnet on tiny, at least 0 % right: " in text
    _changed(path, **{**changes, "reach": 101})
    assert main([*arguments, "--threads", "1", "--variants", "sparse"]) == 0
    assert "sparse of m_cifarnet on tiny, at least 101 % right: none" in capsys.readouterr().out
