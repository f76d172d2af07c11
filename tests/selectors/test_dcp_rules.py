"""DCP against its rules in plain Python, and where they say that selection stops."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcx_kernels.selectors import DCP


def as_lists(sets):
    return {name: s.indices.tolist() for name, s in sets.items()}


def by_the_rules(sizes, budget, min_active, strict, scores):
    """What should be active: a list of (group, channel), all of it looked up in plain Python."""
    ranking = sorted(scores, key=lambda key: (-scores[key], key))
    threshold = sorted(scores.values())[len(scores) - budget - 1] if budget < len(scores) else None
    wanted = ranking[:budget]
    if strict and threshold is not None:
        wanted = [key for key in ranking if scores[key] > threshold]
    forced = set()
    for g, size in enumerate(sizes):
        forced |= set([key for key in ranking if key[0] == g][: min(min_active, size)])
    chosen = forced | set(wanted)
    for key in reversed(ranking):
        if len(chosen) > budget and key in chosen and key not in forced:
            chosen.remove(key)
    return chosen


@settings(deadline=None, max_examples=60)  # a busy machine is no defect
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.floats(0.05, 1),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from(["selected", "all"]),
    st.sampled_from(["zero", "inverse"]),
    st.integers(0, 2),
    st.integers(0, 1000),
)
def test_dcp_follows_the_rules(
    sizes, density, min_active, strict, scope, initial, warmup_steps, seed
):
    least = sum(min(n, min_active) for n in sizes)
    density = max(density, (least + 0.5) / sum(sizes)) if least < sum(sizes) else 1.0
    groups = {f"g{g}": n for g, n in enumerate(sizes)}
    decay = {0: 0.5, 3: 0.75, 5: 1.0}
    options = {"strict": strict, "decay_scope": scope, "initial": initial}
    limits = {"warmup_steps": warmup_steps, "min_active": min_active}
    selector = DCP(groups, density, decay=decay, **limits, **options)
    utility = {
        (g, k): 1 / n if initial == "inverse" else 0.0
        for g, n in enumerate(sizes)
        for k in range(n)
    }
    generator = torch.Generator().manual_seed(seed)
    for step in range(8):
        chosen = by_the_rules(sizes, selector.budget, min_active, strict, utility)
        assert as_lists(selector.final()) == {
            f"g{g}": sorted(k for h, k in chosen if h == g) for g in range(len(sizes))
        }
        if step < warmup_steps:
            chosen = set(utility)
        sets = selector.select()
        assert sum(map(len, sets.values())) == len(chosen)
        # few values, so that there are ties; halves and quarters, so that sums are exact
        saliency = {n: torch.randint(0, 3, (len(s),), generator=generator) for n, s in sets.items()}
        now = max(start for start in decay if start <= step)
        for g, (name, theta) in enumerate(saliency.items()):
            largest = int(theta.max()) or 1
            values = dict(zip(sets[name].indices.tolist(), theta.tolist(), strict=True))
            for k in range(sizes[g]):
                if (g, k) in chosen:
                    utility[g, k] = decay[now] * utility[g, k] + values[k] / largest
                elif scope == "all":
                    utility[g, k] *= decay[now]
        selector.update({name: theta.double() for name, theta in saliency.items()})
        found = torch.cat(list(selector.utility.values())).tolist()
        assert found == [utility[key] for key in sorted(utility)]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.floats(0.05, 1),
    st.integers(1, 3),
    st.sampled_from(["selected", "all"]),
    st.integers(0, 1000),
)
def test_dcp_selection_stops_at_lambda_1(sizes, density, min_active, scope, seed):
    least = sum(min(n, min_active) for n in sizes)
    density = max(density, (least + 0.5) / sum(sizes)) if least < sum(sizes) else 1.0
    groups = {f"g{g}": n for g, n in enumerate(sizes)}
    selector = DCP(groups, density, decay=1.0, decay_scope=scope, min_active=min_active)
    generator = torch.Generator().manual_seed(seed)
    state = selector.state_dict()
    state["utility"] = torch.rand(sum(sizes), generator=generator, dtype=torch.float64)
    selector.load_state_dict(state)
    first = as_lists(selector.select())
    for _ in range(5):
        selector.update(
            {n: torch.rand(len(s), generator=generator) for n, s in selector.select().items()}
        )
        assert as_lists(selector.select()) == as_lists(selector.final()) == first
