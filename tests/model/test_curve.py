"""The latency curve: interpolation, measuring a runner, and the cache."""

from pathlib import Path

import pytest

from tests.support.tiny import tiny_engine
from workers.model.curve import CONTEXTS, ROWS, LatencyCurve

CURVE = LatencyCurve("device", "float32", (100, 300), (1, 4, 8), ((10.0, 16.0, 18.0), (12.0, 20.0, 26.0)))


@pytest.mark.parametrize(
    ("rows", "context", "ms"),
    [
        (1, 100, 10.0),
        (8, 300, 26.0),
        (2, 100, 12.0),
        (6, 200, (17.0 + 23.0) / 2),
        (16, 100, 22.0),  # beyond the widest: along the last pair
        (1, 500, 14.0),
        (1, 0, 10.0),  # below the shortest context nothing is promised
        (0, 100, 10.0),
    ],
)
def test_interpolates_between_measured_points(rows: int, context: int, ms: float) -> None:
    assert CURVE.at(rows, context) == pytest.approx(ms)


def test_prints_a_table() -> None:
    lines = str(CURVE).splitlines()
    assert [line.split()[0] for line in lines] == ["context", "100", "300"]
    assert lines[2].split()[1:4] == ["12.0", "20.0", "26.0"]


def test_measures_and_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYDECODE_CACHE", str(tmp_path))
    with tiny_engine() as engine:
        free = engine.status().free_pages
        curve = engine.measure()
        assert engine.curve is curve
        assert engine.status().free_pages == free
        assert curve.rows == ROWS
        assert curve.contexts[0] == CONTEXTS[0]
        assert all(cost > 0 for costs in curve.ms for cost in costs)
        assert engine.measure() == curve  # from the cache: a second measurement would differ
        assert engine.measure(fresh=True) != curve
    assert len(list((tmp_path / "curves").iterdir())) == 1


def test_requests_go_on_while_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYDECODE_CACHE", str(tmp_path))
    with tiny_engine() as engine:
        alone = [event.text for event in engine.generate("hello", temperature=0, max_new_tokens=40)]
        events = engine.generate("hello", temperature=0, max_new_tokens=40)
        beside = [next(events).text]
        engine.measure()
        beside += [event.text for event in events]
        assert "".join(beside) == "".join(alone)
