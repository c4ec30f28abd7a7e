import pytest

from protocol.trace import StepTrace, ThreadStep, summarise
from traces.metrics import Figures, by_category, figures_of


def _record(*tokens_per_step: int) -> dict:
    steps = [
        StepTrace(
            step=number,
            t_ms=100.0 * (number + 1),
            forward_ms=1,
            width=1,
            batch_width=1,
            kv_tokens=1,
            threads=[ThreadStep(thread=0, accepted=count - 1, token_ids=[7] * count)],
        )
        for number, count in enumerate(tokens_per_step)
    ]
    summary = summarise(steps, ttft_ms=1, elapsed_ms=100 * len(steps), finish_reason="stop")
    return {"traces": [{"summary": summary.model_dump()}]}


def test_many_requests_give_ratios_of_sums() -> None:
    total = figures_of(_record(3)) + figures_of(_record(1, 1, 1))
    assert (total.questions, total.tokens, total.steps) == (2, 6, 4)
    assert total.tokens_per_step == 1.5  # the mean of the ratios would be 2
    assert total.tokens_per_s == pytest.approx(6 / 0.4)
    assert total.mean_acceptance_length == 1 + 2 / 4


def test_categories_keep_their_order() -> None:
    sums = by_category([("b", Figures(tokens=1)), ("a", Figures(tokens=2)), ("b", Figures(tokens=3))])
    assert [(name, figures.tokens) for name, figures in sums.items()] == [("b", 4), ("a", 2)]


def test_nothing_divides_by_zero() -> None:
    figures = figures_of(_record())
    assert (figures.tokens_per_step, figures.tokens_per_s, figures.mean_acceptance_length) == (0, 0, 0)
