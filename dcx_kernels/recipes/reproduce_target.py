"""The tables and figures that can be reproduced: each a small file of settings and numbers.

A file in ``targets/`` says which networks are trained how, and what the paper printed for them; a
study of one's own is such a file anywhere else, which needs no ``source``:

- ``settings``: of the recipe; ``settings_of`` changes some for a data set or a network, and
  ``variants`` names the recipe and what else tells one line of the table from the next.
- ``entries``: the lines of the table with the published numbers, or ``grid``: all combinations.
- ``metrics``: the columns; ``reference``: the variant that a change of accuracy is counted from.
- ``reach``: the accuracy in percent whose time is measured.
- ``published``: other targets whose numbers belong to the same lines.
- ``scale``: what is smaller than in the papers, unless the options say otherwise: the fields of
  `dcx_kernels.recipes.reproduce_scale.Options` but for data, budget and machine.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

from dcx_kernels.errors import expected

__all__ = ["Entry", "Target", "load_target", "target_names"]

_STUDY = ".json"
_OPTIONAL = frozenset(
    {
        "settings_of",
        "source",
        "reference",
        "reach",
        "notes",
        "published",
        "entries",
        "grid",
        "scale",
    }
)
_NEEDED = frozenset({"title", "seeds", "settings", "variants", "metrics", "figure"})


@dataclass(frozen=True)
class Entry:
    """One line of a table: a network trained in one way.

    Args:
        data: the paper's data set.
        model: network.
        variant: key of `Target.variants`.
        density: kept fraction of channels.
        paper: metric -> published number; empty if there is none.
    """

    data: str
    model: str
    variant: str
    density: float
    paper: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Target:
    """A table or figure of a paper, or a study. What its parts mean: see the module.

    Args (beside those parts):
        name: of the directory its results go to.
        config: name of its file.
        whole: how many seeds and lines there are before it is narrowed.

    Raises:
        ValueError: if a part contradicts another one.
    """

    name: str
    config: str
    title: str
    source: str
    seeds: tuple[int, ...]
    settings: Mapping[str, Any]
    settings_of: Mapping[str, Mapping[str, Any]]
    variants: Mapping[str, Mapping[str, Any]]
    metrics: tuple[str, ...]
    reference: str | None
    reach: float | None
    figure: str
    notes: tuple[str, ...]
    entries: tuple[Entry, ...]
    scale: Mapping[str, Any]
    whole: tuple[int, int]

    def __post_init__(self) -> None:
        for entry in self.entries:
            if entry.variant not in self.variants:
                raise ValueError(expected(_one_of(self.variants), entry.variant, self.name))
        if self.reference is not None and self.reference not in self.variants:
            raise ValueError(expected(_one_of(self.variants), self.reference, self.name))

    def settings_for(self, entry: Entry) -> dict[str, Any]:
        """Return the paper's settings for a line, ``recipe`` among them."""
        special = self.settings_of
        return {
            **self.settings,
            **special.get(entry.data, {}),
            **special.get(entry.model, {}),
            **self.variants[entry.variant],
        }

    def values(self, name: str) -> list[Any]:
        """Return all values of ``data``, ``model``, ``variant`` or ``density``, each once."""
        return list(dict.fromkeys(getattr(entry, name) for entry in self.entries))

    def densities(self) -> list[float]:
        """Return the densities of all lines that have a choice, from the lowest."""
        return sorted({e.density for e in self.entries if not self.is_dense(e)})

    def is_dense(self, entry: Entry) -> bool:
        """Tell whether a line is the ordinary network, which has no density to choose."""
        return bool(self.variants[entry.variant].get("recipe") == "dense")

    def narrowed(
        self,
        densities: Sequence[float] | None = None,
        models: Sequence[str] | None = None,
        variants: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Target:
        """Return the part that was asked for; None asks for all.

        The ordinary networks stay, whatever the densities: the others are compared with them.

        Raises:
            ValueError: naming what is not in this target, with what is.
        """
        _check(self.name, "densities", densities, self.densities())
        _check(self.name, "models", models, self.values("model"))
        _check(self.name, "variants", variants, self.values("variant"))
        if seeds is not None:
            wrong = [seed for seed in seeds if seed < 0]
            if not seeds or wrong or len(set(seeds)) < len(seeds):
                got = ",".join(map(str, seeds)) or "none"
                raise ValueError(expected("different seeds of at least 0", got, self.name))
        entries = tuple(
            entry
            for entry in self.entries
            if (densities is None or self.is_dense(entry) or entry.density in densities)
            and (models is None or entry.model in models)
            and (variants is None or entry.variant in variants)
        )
        if not entries:
            raise ValueError(f"{self.name}: nothing is left of it with these options")
        return replace(self, entries=entries, seeds=self.seeds if seeds is None else tuple(seeds))


def target_names() -> list[str]:
    """Return the names of all targets."""
    found = files("dcx_kernels.recipes").joinpath("targets").iterdir()
    return sorted(f.name.removesuffix(_STUDY) for f in found if f.name.endswith(_STUDY))


def load_target(name: str) -> Target:
    """Return a target by name, or a study: by the path of its file, which ends in ``.json``.

    Raises:
        ValueError: if there is none of that name, the message lists near ones; if a file cannot be
            read or has other keys than the module says.
    """
    content = _read(name)
    if not _NEEDED <= set(content) <= _NEEDED | _OPTIONAL:
        what = f"the keys {sorted(_NEEDED)} and no others but {sorted(_OPTIONAL)}"
        raise ValueError(expected(what, sorted(content), name))
    others = (_read(other) for other in content.get("published", ()))
    published = {entry: entry.paper for other in others for entry in _entries(other)}
    entries = tuple(
        replace(entry, paper={**published.get(entry, {}), **entry.paper})
        for entry in _entries(content)
    )
    path = Path(name)
    return Target(
        name=path.stem if path.suffix == _STUDY else name,
        config=path.name if path.suffix == _STUDY else f"{name}{_STUDY}",
        title=content["title"],
        source=content.get("source", ""),
        seeds=tuple(content["seeds"]),
        settings=content["settings"],
        settings_of=content.get("settings_of", {}),
        variants=content["variants"],
        metrics=tuple(content["metrics"]),
        reference=content.get("reference"),
        reach=content.get("reach"),
        figure=content["figure"],
        notes=tuple(content.get("notes", ())),
        entries=entries,
        scale=content.get("scale", {}),
        whole=(len(content["seeds"]), len(entries)),
    )


def _read(name: str) -> dict[str, Any]:
    if name.endswith(_STUDY):
        return _read_study(Path(name))
    names = target_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f"; near: {', '.join(near)}" if near else ""
        what = f"a target out of {', '.join(names)}, or a file {_STUDY}"
        raise ValueError(expected(what, repr(name) + hint))
    path = files("dcx_kernels.recipes").joinpath("targets").joinpath(f"{name}{_STUDY}")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _read_study(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(expected("a study, a JSON file", str(error), str(path))) from error
    if not isinstance(content, dict):
        raise ValueError(expected("a JSON object", type(content).__name__, str(path)))
    return content


def _entries(content: Mapping[str, Any]) -> Iterator[Entry]:
    for line in content.get("entries", ()):
        yield Entry(**line)
    if "grid" in content:
        grid = content["grid"]
        parts = (grid[key] for key in ("data", "models", "variants", "densities"))
        for data, model, variant, density in product(*parts):
            yield Entry(data, model, variant, density)


def _check(name: str, what: str, asked: Sequence[Any] | None, known: Sequence[Any]) -> None:
    wrong = [value for value in asked or () if value not in known]
    if wrong or (asked is not None and not asked):
        listed = ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in known)
        got = ", ".join(f"{v:g}" if isinstance(v, float) else repr(v) for v in wrong) or "none"
        raise ValueError(expected(f"{what} out of {listed}", got, name))


def _one_of(names: Mapping[str, Any]) -> str:
    return f"a variant out of {', '.join(names)}"
