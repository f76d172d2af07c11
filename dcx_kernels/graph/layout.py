"""Which channel stands where: every channel of a network has a number, an axis is a list of them.

A tensor's channel axis is a `Layout`: the numbers of its channels, in order. Concatenation joins
such lists, slices and shuffles index them, a residual add makes two of them one (or a union), and
whatever the rules say of an axis is said of the groups whose channels stand there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["ABSENT", "ALWAYS", "ChannelTable", "Ids", "Layout", "Union"]

Ids = NDArray[np.int64]
ALWAYS, ABSENT = 0, 1  # a channel that is on for good (the image's), and one that is zero for good


@dataclass(frozen=True, eq=False)
class Layout:
    """What dim 1 of a tensor holds: channels by number, ``inner`` features each."""

    ids: Ids
    inner: int = 1

    def __len__(self) -> int:
        return len(self.ids)

    def __deepcopy__(self, memo: dict[int, Any]) -> Layout:
        return self  # never changes, and tables are keyed by it


class Union(NamedTuple):
    """Channels that exist where any of several others does: the sum of unlike branches."""

    start: int
    parts: list[Ids]

    @property
    def ids(self) -> Ids:
        """Numbers of the sum's channels."""
        return np.arange(self.start, self.start + len(self.parts[0]))


class ChannelTable:
    """Numbers the channels; remembers which are one, which are sums, which must stay."""

    def __init__(self) -> None:
        self._root = np.arange(2)
        self._groups: dict[str, Ids] = {}
        self._owner: list[str] = ["", ""]
        self._reasons: dict[str, str] = {}
        self._runs: dict[str, int] = {}
        self.unions: list[Union] = []

    def group(self, name: str, num_channels: int) -> Ids:
        """Return the channels of a producer's output, numbered on first sight."""
        if name not in self._groups:
            self._groups[name] = self._number(num_channels, name)
        return self.resolve(self._groups[name])

    def _number(self, count: int, owner: str) -> Ids:
        start = len(self._root)
        ids = np.arange(start, start + count)
        self._root = np.concatenate([self._root, ids])
        self._owner += [owner] * count
        return ids

    def resolve(self, ids: Ids) -> Ids:
        """Return the numbers that stand for ``ids`` after what was tied since."""
        return self._root[ids]

    @property
    def state(self) -> tuple[Any, ...]:
        """What passes over the graphs found; equal states mean that nothing is left to find."""
        ties = self._root.tobytes()
        return ties, len(self.unions), dict(self._reasons), dict(self._runs)

    # --- ties -------------------------------------------------------------------------------------

    def tie(self, a: Ids, b: Ids) -> bool:
        """Make channels one, position by position; False (and nothing) where that is impossible.

        One side must consist of whole groups: these then follow the other side.
        """
        a, b = sorted((self.resolve(a), self.resolve(b)), key=lambda ids: tuple(ids[:1]))
        if np.array_equal(a, b):
            return True
        if len(a) != len(b):
            return False
        for onto, follower in ((a, b), (b, a)):
            if self._can_follow(follower, onto):
                for name in {self._owner[i] for i in follower}:
                    if name in self._reasons:
                        self.keep(onto, self._reasons[name])
                    if name in self._runs:  # a grouped conv works on it: only a whole group may
                        self.equal_runs(onto, self._runs[name], f"grouped convolution ({name})")
                onto_of = dict(zip(follower.tolist(), onto.tolist(), strict=True))
                self._root = np.array([onto_of.get(r, r) for r in self._root.tolist()])
                return True
        return False

    def _can_follow(self, follower: Ids, onto: Ids) -> bool:
        owners = {self._owner[i] for i in follower}
        if "" in owners or np.isin(onto, (ALWAYS, ABSENT)).any():
            return False
        whole = sum(len(self._groups[name]) for name in owners) == len(np.unique(follower))
        each_once = len(np.unique(follower)) == len(follower)
        return whole and each_once and not np.isin(follower, self._sources(onto)).any()

    def _sources(self, ids: Ids) -> Ids:
        """Return ``ids`` and everything that the sums among them are made of."""
        found = set(ids.tolist())
        for union in reversed(self.unions):
            at = np.isin(union.ids, list(found))
            for part in union.parts:
                found.update(self.resolve(part)[at].tolist())
        return np.fromiter(found, np.int64, len(found))

    # --- sums -------------------------------------------------------------------------------------

    def union(self, parts: list[Ids]) -> Ids:
        """Return the channels of a sum, each of which exists where any of its terms does."""
        parts = [self.resolve(part) for part in parts]
        if all(np.array_equal(parts[0], part) for part in parts[1:]):
            return parts[0]
        for union in self.unions:
            known = [self.resolve(part) for part in union.parts]
            if len(known) == len(parts) and all(map(np.array_equal, known, parts)):
                return self.resolve(union.ids)
        ids = self._number(len(parts[0]), "")
        self.unions.append(Union(int(ids[0]), parts))
        return ids

    # --- what must hold ---------------------------------------------------------------------------

    def keep(self, ids: Ids, reason: str) -> None:
        """Keep every group among ``ids`` full-width; the first reason stands."""
        for name in self.owners(ids):
            self._reasons.setdefault(name, reason)

    def owners(self, ids: Ids) -> list[str]:
        """Name the groups whose channels are among ``ids`` or in sums among them."""
        sources = np.unique(self._sources(self.resolve(ids)))
        return list(dict.fromkeys(self._owner[i] for i in sources if self._owner[i]))

    def equal_runs(self, ids: Ids, runs: int, reason: str) -> None:
        """Let a group's sets hold equal counts in each of ``runs`` runs; only a whole group can."""
        ids = self.resolve(ids)
        name = self._owner[ids[0]]
        if not name or not np.array_equal(ids, self._groups[name]):
            self.keep(ids, reason)
            return
        self._runs[name] = math.lcm(self._runs.get(name, 1), runs)
        if len(ids) % self._runs[name]:
            self.keep(ids, reason)

    # --- what was found ---------------------------------------------------------------------------

    def found(self) -> dict[str, tuple[Ids, int, str]]:
        """Return (channels, runs, reason for being kept or "") of every group that is its own."""
        return {
            name: (ids, self._runs.get(name, 1), self._reasons.get(name, ""))
            for name, ids in self._groups.items()
            if np.array_equal(self.resolve(ids), ids)
        }

    def __len__(self) -> int:
        return len(self._root)
