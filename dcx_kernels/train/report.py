"""One self-contained HTML file about a run: table, figures, configuration, machine."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dcx_kernels.train import figures, figures_groups
from dcx_kernels.train.atomic import replace_text
from dcx_kernels.train.table import COLUMNS, cells, size

__all__ = ["write_report"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 54rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } th, td { padding: .3rem .8rem; text-align: right;
  border-bottom: 1px solid #ddd; } th:first-child, td:first-child { text-align: left; }
td.text { text-align: left; } img { max-width: 100%; height: auto; }
p.note { color: #555; }
"""

_MEANING = {
    "dense": "all channels, ordinary PyTorch",
    "mask": "the papers' way: compute all channels, multiply the inactive ones by zero",
    "sparse": "only the active channels exist",
    "thin": "the final selection as a plain, physically smaller network",
}


def write_report(path: Path, result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the report of a run.

    Args:
        path: the HTML file to create or replace.
        result: what ``result.json`` holds, see `dcx_kernels.recipes.experiment`.
        rows: the rows of the log.
    """
    arms = [arm["arm"] for arm in result["arms"]]
    title = f"{result['experiment']['model']} on {result['experiment']['data']}"
    parts = [
        f"<h1>{escape(result['title'])}: {escape(title)}</h1>",
        f"<p>{escape(_summary(result))}</p>",
        _comparison(result["arms"]),
        _notes(result),
        "<h2>Accuracy and loss</h2>",
        _image(figures.accuracy_curves(rows, arms), "test accuracy per epoch of each network"),
        _image(figures.loss_curves(rows, arms), "training loss per step of each network"),
        "<h2>Channels</h2>",
        *_group_figures(result, rows),
        "<h2>Time and memory</h2>",
        _image(figures.cost_bars(result["arms"]), "step time and saved bytes of each network"),
        "<h2>Configuration</h2>",
        _pairs([*result["experiment"].items(), *result["config"].items()]),
        "<h2>Machine and versions</h2>",
        _pairs([*result["machine"].items(), *result["versions"].items()]),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join(parts)
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'
    replace_text(path, page)


def _group_figures(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    channels = result["channels"]
    found = [
        _image(
            figures_groups.channels_over_time(rows, "sparse", channels),
            "active fraction of each channel group over the steps",
        ),
        _image(
            figures_groups.kept_over_epochs(rows, "sparse", channels),
            "kept fraction of each channel group over the epochs",
        ),
    ]
    scores = figures_groups.scores_over_epochs(rows, "sparse", channels)
    if scores is not None:
        found.append(_image(scores, "mean score of each channel group over the epochs"))
    final = figures_groups.final_channels(result["final"], channels)
    return [*found, _image(final, "channels kept in each group")]


def _summary(result: Mapping[str, Any]) -> str:
    kept, total = sum(result["final"].values()), sum(result["channels"].values())
    config = result["config"]
    chosen = f"selected by {config['selector']}"
    if config.get("final") == "random":
        chosen += ", then drawn at random,"
    procedure = f"{config['procedure']} procedure, " if "procedure" in config else ""
    return (
        f"{kept} of {total} channels {chosen} at density "
        f"{config['density']:g}; {procedure}{config['epochs']} epochs of "
        f"batches of {config['batch_size']}."
    )


def _notes(result: Mapping[str, Any]) -> str:
    notes = [f"{arm['arm']}: {_MEANING[arm['arm']]}" for arm in result["arms"]]
    thin = result["arms"][-1]["steps"]
    tuned = f", fine-tuned for {thin} steps." if thin else ", not trained any further."
    text = ". ".join(notes) + tuned
    selecting = ", ".join(
        f"{arm['arm']} {arm['selecting_step_ms']:.1f} ms and {size(arm['selecting_saved_bytes'])}"
        for arm in result["arms"]
        if arm["selecting_step_ms"] is not None
    )
    if selecting:
        text += f" Median step and saved bytes while channels changed at every step: {selecting}."
    if result["config"]["recalibrate"]:
        before = ", ".join(
            f"{arm['arm']} {100 * arm['accuracy_as_trained']:.2f} %"
            for arm in result["arms"]
            if arm.get("accuracy_as_trained") is not None
        )
        text += (
            " Batch-norm statistics were measured again for the final selection before the "
            f"evaluation in the table (without: {before})."
        )
    else:
        text += " Batch-norm statistics are those of training; they were not measured again."
    return f'<p class="note">{escape(text)}</p>'


def _comparison(arms: Iterable[Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells(arm)) + "</tr>"
        for arm in arms
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _pairs(items: Iterable[tuple[str, object]]) -> str:
    body = "".join(
        f'<tr><td>{escape(str(key))}</td><td class="text">{escape(str(value))}</td></tr>'
        for key, value in items
    )
    return f"<table>{body}</table>"


def _image(png: bytes, alternative: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'<p><img alt="{escape(alternative)}" src="data:image/png;base64,{data}"></p>'
