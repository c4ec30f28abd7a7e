"""Sizes by expected tokens over expected time."""

from types import SimpleNamespace
from typing import Any

import pytest

from workers.model.curve import LatencyCurve
from workers.model.tree import TokenTree
from workers.tuning import Tuner, trust

FLAT = LatencyCurve("device", "float32", (100,), (1, 64), ((10.0, 10.5),))
STEEP = LatencyCurve("device", "float32", (100,), (1, 2), ((10.0, 20.0),))
SLOPED = LatencyCurve("device", "float32", (100,), (1, 11), ((10.0, 20.0),))  # one millisecond a row


def thread() -> Any:
    return SimpleNamespace(state={})


def tuned(curve: LatencyCurve | None, *, threads: int = 1, rows: int = 16) -> Any:
    tuner = Tuner()
    tuner.curve = curve
    return tuner.budget(rows, fixed=threads, emitting=threads, drafting=threads, context=100)


def outcome(expected: float, accepted: int) -> Any:
    tree = TokenTree.of([1], [-1], chances=[expected])
    return SimpleNamespace(tree=tree, rows=[0] * accepted)


@pytest.mark.parametrize(
    ("curve", "chances", "worth"),
    [
        (None, [0.1] * 9, 9),  # without a curve there are no prices
        (FLAT, [0.3, 0.2, 0.1, 0.01], 4),
        (STEEP, [0.9, 0.8, 0.7], 0),
        (SLOPED, [0.5, 0.3, 0.05], 2),  # 1/10, 1.5/11, 1.8/12, 1.85/13
        (SLOPED, [0.05], 0),
        (SLOPED, [], 0),
    ],
)
def test_as_many_candidates_as_pay(curve: LatencyCurve | None, chances: list[float], worth: int) -> None:
    assert tuned(curve).worth(thread(), chances) == worth


def test_the_batch_is_in_view() -> None:
    """Where rows cost more the more there are, eight threads draft less than one."""
    curve = LatencyCurve("device", "float32", (100,), (1, 16, 64), ((10.0, 10.5, 60.0),))
    chances = [0.3, 0.2, 0.15, 0.1, 0.1, 0.1]
    assert tuned(curve).worth(thread(), chances) == 6
    assert tuned(curve, threads=8).worth(thread(), chances) <= 2


def test_disappointment_makes_drafts_smaller_and_wears_off() -> None:
    tuner, own = Tuner(), thread()
    for _ in range(30):
        tuner.observe([own], [outcome(0.5, 0)])
    assert trust(own) < 0.2
    assert tuned(SLOPED).worth(own, [0.5, 0.3]) == 0
    nothing = SimpleNamespace(tree=TokenTree.of([], []), rows=[])
    window = outcome(0.0, 0)  # rows that are no candidates
    for undrafted in (nothing, window):
        own.state["tuning"] = [15.0, 0.0]
        for _ in range(400):
            tuner.observe([own], [undrafted])
        assert trust(own) > 0.9


def test_drafts_that_cost_more_than_they_bring_are_made_seldom() -> None:
    tuner, own = Tuner(), thread()
    tuner.curve = SLOPED

    def asked(steps: int, accepted: int, drafting_ms: float = 0.0) -> int:
        count = 0
        for _ in range(steps):
            asks = tuner.budget(16, fixed=1, emitting=1, drafting=1, context=100).asks(own)
            count += asks
            made = outcome(0.5, accepted) if asks else SimpleNamespace(tree=TokenTree.of([], []), rows=[])
            tuner.observe([own], [made], drafting_ms if asks else 0.0)
        return count

    assert asked(16, 1) == 16
    assert asked(80, 0) < 25
    assert asked(24, 2) >= 3
    assert asked(8, 2) == 8, "what pays again is drafted again"
    assert asked(80, 1, drafting_ms=15.0) < 40, "a token is no gain where the draft takes longer than a step"
    assert tuned(None).asks(own)


def test_a_window_pays_only_where_rows_are_cheap() -> None:
    options = [(6, 0.1), (30, 0.3), (60, 0.31)]
    assert tuned(FLAT).best(options, 1) == 1
    assert tuned(SLOPED).best(options, 1) is None
    assert tuned(None).best(options, 1) == 1
