"""The speed of drafts beside ordinary decoding's, by the latency curve."""

import logging

import pytest

from tests.support.tiny import tiny_engine
from workers.model.curve import LatencyCurve
from workers.pace import ENOUGH_STEPS, Pace, Pacer, Part

SLOPED = LatencyCurve("device", "float32", (100,), (1, 11), ((10.0, 20.0),))  # one millisecond a row


def pacer(curve: LatencyCurve | None = SLOPED) -> Pacer:
    made = Pacer()
    made.curve = curve
    return made


def test_a_step_is_worth_its_tokens_and_costs_its_rows() -> None:
    pace = Pace()
    pacer().record([Part("ngram", pace, 4, 3)], fixed=1, context=100, drafting_ms=1.0)
    assert pace.ratio == pytest.approx(3 * 10 / (10 + 4 + 1))


def test_the_rows_without_drafts_are_shared_and_the_others_are_their_owners() -> None:
    keeper, mine, other = pacer(), Pace(), Pace()
    keeper.record([Part("ngram", mine, 6, 2), Part("vanilla", other, 0, 1)], fixed=2, context=100, drafting_ms=0)
    assert mine.ratio == pytest.approx(2 * 5.5 / (5.5 + 6))
    assert other.ratio is None, "vanilla is the yardstick"
    assert keeper.methods["ngram"].ratio == mine.ratio


def test_without_a_curve_there_is_no_pace() -> None:
    pace = Pace()
    pacer(None).record([Part("ngram", pace, 4, 3)], fixed=1, context=100, drafting_ms=1.0)
    assert pace.ratio is None


def test_a_method_that_is_slower_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    keeper = pacer()
    with caplog.at_level(logging.WARNING):
        for _ in range(3 * ENOUGH_STEPS):
            keeper.record([Part("lookahead", Pace(), 10, 1)], fixed=1, context=100, drafting_ms=0)
    assert [record.getMessage() for record in caplog.records] == [
        "lookahead decodes at 0.50 x the speed of vanilla here: leave its draft sizes to --tune, or use vanilla"
    ]


def test_the_summary_of_a_request_holds_its_pace() -> None:
    with tiny_engine(methods=["ngram"]) as engine:
        engine.measure()
        params = {"temperature": 0, "max_new_tokens": 30}
        drafted = list(engine.generate("abcabcabc", method="ngram", **params))[-1].summary
        plain = list(engine.generate("abcabcabc", method="vanilla", **params))[-1].summary
        assert drafted is not None and drafted.pace is not None and drafted.pace > 0
        assert plain is not None and plain.pace is None
        assert engine.pace() == {"ngram": pytest.approx(drafted.pace)}
