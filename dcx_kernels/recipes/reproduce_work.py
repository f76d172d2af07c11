"""One training of a target: what it is told, what it starts with, where its checkpoints are."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcx_kernels.data import ImageData
from dcx_kernels.errors import expected
from dcx_kernels.recipes.config import METHODS
from dcx_kernels.recipes.methods import Config
from dcx_kernels.recipes.networks import build_network
from dcx_kernels.recipes.reproduce_target import Entry
from dcx_kernels.recipes.run import Run
from dcx_kernels.recipes.stages import Loaders, make_loaders
from dcx_kernels.train.atomic import replace_text
from dcx_kernels.train.progress import Progress

__all__ = ["Work", "digest", "short_name"]

_ELAPSED = "elapsed.json"
# what tells recipes apart, and what only those of gating take
_NOT_SETTINGS = frozenset(
    {"recipe", "method", "start", "slim", "decay_every", "sparse_epochs", "init", "execution"}
)


@dataclass(frozen=True)
class Work:
    """One line of a table with one seed.

    Args:
        entry: the line.
        seed: of initial weights, data order and selection.
        settings: of its recipe, scaled down already.
        start: settings of the ordinary network it starts from, if it starts from a trained one.
        source: where the images came from, as the user named it.
        data: the images.
        width: factor on the channels of the network.
        device: where it runs.
        channels_last: memory layout.
        root: directory that holds one directory for each training.
        progress: what the user sees meanwhile.
    """

    entry: Entry
    seed: int
    settings: Mapping[str, Any]
    start: Mapping[str, Any] | None
    source: str
    data: ImageData
    width: float
    device: torch.device
    channels_last: bool
    root: Path
    progress: Progress

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the result, as JSON values."""
        found = {**self._network, "seed": self.seed, "settings": dict(self.settings)}
        if self.settings["recipe"] != "dense":
            found["density"] = self.entry.density
        if self.start is not None:
            found["start"] = dict(self.start)
        return found

    @property
    def key(self) -> str:
        """What a finished run is found again by."""
        return digest(self.identity)

    def baseline(self) -> Work:
        """Return the training of the ordinary network that this one starts from.

        Raises:
            ValueError: if it starts from none.
        """
        if self.start is None:
            raise ValueError(expected("settings of a trained network to start from", None))
        entry = replace(self.entry, variant="baseline", density=1.0)
        return replace(self, entry=entry, settings=self.start, start=None)

    def config(self) -> Config:
        """Return the settings as those of a method that selects channels (or of its baseline).

        Raises:
            ValueError: naming a setting that the method does not have, or that is out of range.
        """
        recipe = self.settings["recipe"]
        kind = METHODS[self.settings.get("method", "dce") if recipe == "dense" else recipe]
        given = {k: v for k, v in self.settings.items() if k not in _NOT_SETTINGS}
        unknown = sorted(set(given) - kind.names())
        if unknown:
            raise ValueError(expected(f"settings of {kind.title.lower()}", ", ".join(unknown)))
        return kind(**given, density=self.entry.density, seed=self.seed)

    def config_identity(self) -> dict[str, Any]:
        """Return what the checkpoints of `config` are told apart by."""
        config = self.config()
        found = {**self.shared(), "method": config.method, **asdict(config)}
        if "execution" in self.settings:
            found["execution"] = self.settings["execution"]
        if found.get("procedure") == "two-stage":
            del found["final"]  # until then it is the same training: done once
        return found

    def shared(self) -> dict[str, Any]:
        """Return network, data and start: what checkpoints of any recipe are told apart by."""
        return {**self._network, "start": None if self.start is None else self.baseline().key}

    def run(self, identity: Mapping[str, Any], name: str) -> Run:
        """Return the directory of a training; whatever was trained there before goes on."""
        entry = self.entry
        parts = (entry.data, entry.model.replace(":", "-"), name, f"seed{self.seed}")
        directory = self.root / f"{'-'.join(parts)}-{digest(identity)}"
        return Run(directory, dict(identity), resume=True, progress=self.progress)

    def network(self) -> nn.Module:
        """Build the network with the random weights of this seed."""
        torch.manual_seed(self.seed)
        model = build_network(self.entry.model, self.data.num_classes, self.width).to(self.device)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def loaders(self, batch_size: int, augment: bool | str = True) -> Loaders:
        """Return the batches of this seed."""
        device, last = self.device, self.channels_last
        return make_loaders(self.data, batch_size, augment, self.seed, device, last)

    def example(self) -> Tensor:
        """Return an empty image, (1, C, H, W), on the device: its shape is what counts."""
        return torch.zeros((1, *self.data.image_shape), device=self.device)

    @contextmanager
    def timed(self) -> Iterator[dict[str, float]]:
        """Measure wall time, interruptions left out; yields {"wall_s": so far} to read afterwards.

        A process that is killed outright takes the seconds since it began with it.
        """
        path = self.root / f".{self.key}.{_ELAPSED}"
        spent = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"wall_s": 0.0}
        began = time.perf_counter()
        try:
            yield spent
        except BaseException:
            spent["wall_s"] += time.perf_counter() - began
            replace_text(path, json.dumps(spent))
            raise
        spent["wall_s"] += time.perf_counter() - began
        path.unlink(missing_ok=True)

    @property
    def _network(self) -> dict[str, Any]:
        return {
            "source": short_name(self.source),
            "images": len(self.data.train_labels),
            "model": self.entry.model,
            "width": self.width,
            "classes": self.data.num_classes,
            "image_size": self.data.image_shape[1],
        }


def digest(identity: Mapping[str, Any]) -> str:
    """Return a short name of JSON values."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def short_name(source: str) -> str:
    """Name a data set without the directories it lies in: files move, and results are published."""
    kind, colon, path = source.rpartition(":")
    return f"{kind}{colon}{path.rstrip('/').rpartition('/')[2] or path}"
