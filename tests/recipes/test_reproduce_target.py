"""The targets' files: complete, consistent, and what the papers printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dcx_kernels.recipes.reproduce_recipes import RECIPES
from dcx_kernels.recipes.reproduce_scale import Options, data_sources, scaled_down
from dcx_kernels.recipes.reproduce_table import METRICS
from dcx_kernels.recipes.reproduce_target import Entry, Target, load_target, target_names

METHODS_NOTES = Path(__file__).resolve().parents[3] / "shared" / "methods.md"
NAMES = (
    "dce-figure3",
    "dce-table1",
    "dce-table2",
    "dcp-figures",
    "dcp-table1",
    "dcp-table2",
    "dcp-table4",
    "fbs-figure3",
    "fbs-table3",
    "fbs-table4",
)


def test_there_are_these_targets() -> None:
    assert tuple(target_names()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_files_are_consistent(name: str) -> None:
    target = load_target(name)
    assert len(set(target.entries)) == len(target.entries) > 3
    assert set(target.metrics) <= set(METRICS)
    assert "https://arxiv.org/abs/" in target.source
    assert any(entry.paper for entry in target.entries)
    for entry in target.entries:
        settings = target.settings_for(entry)
        assert settings["recipe"] in RECIPES
        assert {"epochs", "batch_size", "lr"} <= set(settings)
        assert 0 < entry.density <= 1
        assert target.is_dense(entry) <= (entry.density == 1)
        if "start" in settings:
            assert settings["start"] in target.variants


# what is in them, by hand from the papers


def _paper(target: Target, model: str, variant: str, density: float, data: str = "cifar10") -> dict:
    return dict(next(e for e in target.entries if e == Entry(data, model, variant, density)).paper)


def test_dce_table1_says_what_the_paper_prints() -> None:
    target = load_target("dce-table1")
    assert len(target.entries) == 26
    assert _paper(target, "vgg19", "two-stage", 0.7) == {
        "accuracy": 93.11,
        "params": 9_570_000,
        "macs": 284_000_000,
    }
    assert _paper(target, "densenet121", "two-stage", 0.4, "svhn")["macs"] == 14_400_000
    svhn = next(e for e in target.entries if e.data == "svhn")
    assert target.settings_for(svhn)["epochs"] == 20
    assert target.settings_for(target.entries[0])["epochs"] == 160


def test_numbers_of_other_targets_are_found() -> None:
    figure = load_target("dce-figure3")
    assert _paper(figure, "vgg19", "two-stage", 0.7)["accuracy"] == 93.11
    assert _paper(figure, "vgg19", "two-stage", 0.5) == {}
    assert _paper(figure, "vgg19", "random-final", 0.7) == {}
    table = load_target("dce-table2")  # its own numbers and those of Table 1
    assert _paper(table, "vgg19", "single-stage", 0.7) == {"accuracy": 92.2, "change": -0.86}
    assert _paper(table, "vgg19", "two-stage", 0.4)["accuracy"] == 92.02


def test_trained_models_start_as_the_code_does() -> None:
    target = load_target("dcp-table2")
    trained = next(e for e in target.entries if e.variant == "trained")
    settings = target.settings_for(trained)
    expected = {"lr": 0.01, "decay": 0.7, "epochs": 200, "start": "baseline"}
    assert expected.items() <= settings.items()
    scratch = next(e for e in target.entries if e.variant == "scratch")
    assert target.settings_for(scratch)["epochs"] == 300


def _notes() -> str:
    if not METHODS_NOTES.exists():
        pytest.skip("the notes on the papers are not beside this checkout")
    return METHODS_NOTES.read_text(encoding="utf-8")


def test_dce_table1_equals_the_notes() -> None:
    """Every line of the notes' table is in the target, and the other way round."""
    data, found = "", {}
    for line in _notes().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 6 or "/" not in cells[3] or cells[1].startswith("-"):
            continue
        data = cells[0] or data
        numbers = [re.findall(r"[\d.]+", cell.partition("(")[0]) for cell in cells[2:]]
        for density, accuracy, params, macs in zip(*numbers, strict=True):
            model = cells[1].lower().replace("-", "")
            key = data.lower().replace("-", ""), model, float(density) / 100
            found[key] = [float(accuracy), float(params) * 1e6, float(macs) * 1e8]
    assert len(found) == 26
    entries = load_target("dce-table1").entries
    assert {(e.data, e.model, e.density) for e in entries} == set(found)
    for e in entries:
        ours = [e.paper[name] for name in ("accuracy", "params", "macs")]
        assert ours == pytest.approx(found[e.data, e.model, e.density])


def test_dce_table2_equals_the_notes() -> None:
    text = re.search(r"20\.\.90 %: ([\d. ]+?); minus two-stage: ([-+. \d]+)\.", _notes())
    assert text is not None
    accuracy, change = ([float(x) for x in part.split()] for part in text.groups())
    entries = [e for e in load_target("dce-table2").entries if e.variant == "single-stage"]
    assert [e.density for e in entries] == [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert [e.paper["accuracy"] for e in entries] == accuracy
    assert [e.paper["change"] for e in entries] == change


def test_dcp_tables_equal_the_notes() -> None:
    text = " ".join(_notes().split())
    for name, network in (("dcp-table1", "VGG-16"), ("dcp-table2", "ResNet-32")):
        target = load_target(name)
        part = re.search(network + r" base ([\d.]+): (.*?)(?:;|\. From)", text)
        assert part is not None
        base = next(e for e in target.entries if e.variant == "baseline")
        assert base.paper["accuracy"] == float(part[1])
        points = re.findall(r"([-+][\d.]+) at ([\d.]+) %", part[2])
        scratch = [e for e in target.entries if e.variant == "scratch"]
        assert [(e.paper["change"], e.paper["pruned"]) for e in scratch] == [
            (float(change), float(pruned)) for change, pruned in points
        ]
    trained = re.search(r"From a trained model: (.*?); (.*?)\. ImageNet", text)
    assert trained is not None
    for name, part in zip(("dcp-table1", "dcp-table2"), trained.groups(), strict=True):
        lines = [e for e in load_target(name).entries if e.variant == "trained"]
        assert [e.paper["change"] for e in lines] == [float(x) for x in part.split(" / ")]
    study = re.search(
        r"VGG ([\d. /]+) for 0\.1 / 0\.5 / 0\.9, ([\d.]+) changing; ResNet ([\d. /]+), ([\d.]+)",
        text,
    )
    assert study is not None
    numbers = [float(x) for part in study.groups() for x in part.rstrip(".").split(" / ")]
    assert [e.paper["accuracy"] for e in load_target("dcp-table4").entries] == numbers


def test_fbs_tables_equal_the_notes() -> None:
    text = " ".join(_notes().split())
    lines = {e.variant: e.paper for e in load_target("fbs-table4").entries}
    macs = re.search(
        r"FBS ([\d.]+) M MACs \(([\d.]+)x\), NS\+FBS ([\d.]+) M \(([\d.]+)x\), "
        r"NS ([\d.]+) M \(([\d.]+)x\)",
        text,
    )
    assert macs is not None
    for number, variant in enumerate(("fbs", "ns+fbs", "ns")):
        assert lines[variant]["macs"] == pytest.approx(1e6 * float(macs[2 * number + 1]))
        assert lines[variant]["saving"] == float(macs[2 * number + 2])
    assert "d = 0.5: 90.59 / 99.65" in text and lines["fbs"]["accuracy"] == 90.59
    assert "174.3 M MACs, 91.37 % top-1" in text
    assert (lines["baseline"]["macs"], lines["baseline"]["accuracy"]) == (174_300_000, 91.37)
    widths = re.search(
        r"Widths conv0-7: NS ([\d ]+); NS\+FBS ([\d ]+); FBS remaining ([\d ]+)", text
    )
    assert widths is not None
    ns, both, left = ([int(x) for x in part.split()] for part in widths.groups())
    assert (lines["ns"]["widths"], lines["ns+fbs"]["widths"], lines["fbs"]["left"]) == (
        ns,
        both,
        left,
    )
    memory = re.search(
        r"VGG 3x weights ([\d.]+) -> ([\d.]+) MB, activations ([\d.]+) -> ([\d.]+), peak ([\d.]+) "
        r"-> ([\d.]+) MB \(1 image\), ([\d.]+) -> ([\d.]+) GB \(128\); ResNet-18 2x ([\d.]+) -> "
        r"([\d.]+), ([\d.]+) -> ([\d.]+), ([\d.]+) -> ([\d.]+) MB, ([\d.]+) -> ([\d.]+) GB",
        text,
    )
    assert memory is not None
    names = ("weight_mb", "activation_mb", "peak_mb", "peak_128_gb")
    entries = load_target("fbs-table3").entries
    assert len(entries) == 4
    for place, entry in enumerate(entries):
        network, after = divmod(place, 2)
        numbers = [float(memory[1 + 8 * network + 2 * k + after]) for k in range(4)]
        assert [entry.paper[name] for name in names] == numbers


# asking for a part


def test_narrowed_keeps_the_ordinary_networks() -> None:
    target = load_target("dce-table1")
    part = target.narrowed(densities=[0.4], models=["vgg19"], seeds=[5])
    assert [(e.data, e.variant, e.density) for e in part.entries] == [
        (data, *rest)
        for data in ("cifar10", "cifar100", "svhn")
        for rest in (("baseline", 1.0), ("two-stage", 0.4))
    ]
    assert part.seeds == (5,)
    assert target.narrowed() == target


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"densities": [0.55]}, r"expected densities out of 0.3, 0.4, 0.7, 0.8, 0.9, got 0.55"),
        ({"densities": []}, r"expected densities out of .*, got none"),
        (
            {"models": ["vgg91"]},
            r"expected models out of vgg19, resnet50, densenet121, got 'vgg91'",
        ),
        ({"variants": ["mask"]}, r"expected variants out of baseline, two-stage, got 'mask'"),
        ({"seeds": [0, -1]}, r"expected different seeds of at least 0, got 0,-1"),
        ({"seeds": [2, 2]}, r"expected different seeds of at least 0, got 2,2"),
        ({"seeds": []}, r"expected different seeds of at least 0, got none"),
        (
            {"models": ["resnet50"], "densities": [0.7], "variants": ["two-stage"]},
            "nothing is left",
        ),
    ],
    ids=str,
)
def test_wrong_parts_are_refused(part: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^dce-table1: .*{message}|^dce-table1: {message}"):
        load_target("dce-table1").narrowed(**part)


def test_wrong_target_names_the_near_ones() -> None:
    with pytest.raises(ValueError, match=r"got 'dce-table3'; near: dce-table2"):
        load_target("dce-table3")


def test_data_sources() -> None:
    target = load_target("dce-table1")
    assert data_sources(target, ["digits"]) == {"cifar10": "digits"}
    assert data_sources(target, ["svhn=svhn:a/b=c", "x/y=z.npz"]) == {
        "svhn": "svhn:a/b=c",
        "cifar10": "x/y=z.npz",
    }
    for given, message in (
        ([], "cifar100=SOURCE or --data svhn=SOURCE, got no --data"),
        (["mnist=digits"], "expected --data for cifar10, cifar100, svhn, got 'mnist=digits'"),
        (["digits", "cifar10=digits"], "expected one --data for cifar10"),
        (["svhn="], "expected a data set behind svhn="),
    ):
        with pytest.raises(ValueError, match=message):
            data_sources(target, given)


@pytest.mark.parametrize(
    "name", ["epochs", "batch_size", "image_size", "lr", "width", "train_images", "budget_s"]
)
def test_options_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name.partition("_")[0]):
        Options({"cifar10": "digits"}, **{name: 0})


def test_the_papers_recipe_is_not_called_scaled_down() -> None:
    target = load_target("dce-table2")
    options = Options({"cifar10": "x"}, epochs=160, batch_size=64, lr=0.1)
    assert scaled_down(target, options, {}) == []
    options = Options({"cifar10": "x"}, epochs=3, width=0.25)
    part = target.narrowed(seeds=[1], densities=[0.2])
    assert scaled_down(part, options, {}) == [
        "epochs 3 (paper 160)",
        "width x 0.25",
        "1 seed (3)",
        "2 of 16 lines",
    ]
