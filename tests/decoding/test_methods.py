"""Every method answers what vanilla answers: greedy and sampled, alone and beside other methods, whatever its sizes."""

from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any

import pytest

from benchmarks.verify import tokens_of
from protocol.generation import GenerateParams
from tests.support.oracle import assert_same_answer
from tests.support.tiny import tiny_checkpoint, tiny_engine
from workers.engine import Engine
from workers.request import Event

METHODS = ["ngram", "lookahead", "lookahead+ngram", "vanilla+ngram"]
FAMILIES = ["llama", "gemma3", "gpt2", "gpt_oss"]
SMALL, LARGE = {"window": 1, "level": 3, "guesses": 1}, {"window": 15, "level": 5, "guesses": 15}
SIZES: list[dict[str, int]] = [{}, SMALL, LARGE, {"nodes": 1}, {"nodes": 40}]
TEXTS = ["abcabcabcab", "hello hello world hello", "z", "the cat and the dog and the cat and the"]


def answers(engine: Engine, requests: Sequence[dict[str, Any]]) -> list[list[int]]:
    queues: list[SimpleQueue[Event]] = [SimpleQueue() for _ in requests]
    for request, queue in zip(requests, queues, strict=True):
        engine.submit(GenerateParams.model_validate({"echo": False, **request}), queue.put)
    return [tokens_of(queue) for queue in queues]


def requests(**options: Any) -> list[dict[str, Any]]:
    return [{"prompt": text, "max_new_tokens": 48, "seed": index, **options} for index, text in enumerate(TEXTS)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_vanilla(family: str) -> None:
    model = tiny_checkpoint(family).model
    with tiny_engine(family, methods=METHODS) as engine:
        plain = answers(engine, requests(temperature=0, method="vanilla"))
        together: list[dict[str, Any]] = []
        for method in METHODS:
            for sizes in SIZES:
                mine = requests(temperature=0, method=method, draft=sizes)
                together += mine
                alone = answers(engine, mine[:1])
                assert_same(engine, model, TEXTS[:1], alone, plain)
        for start in range(0, len(together), 16):
            batch = together[start : start + 16]
            assert_same(engine, model, [r["prompt"] for r in batch], answers(engine, batch), plain * 4)
        status = engine.status()
        assert status.free_pages == status.total_pages
        assert engine.counters.accepted > 0


def assert_same(engine: Engine, model: Any, texts: list[str], ours: list[list[int]], plain: list[list[int]]) -> None:
    for text, answer, expected in zip(texts, ours, plain, strict=False):
        assert_same_answer(model, engine.renderer.encode(text).token_ids, answer, expected)


def test_answers_may_fill_the_context() -> None:
    with tiny_engine("gpt2", methods=METHODS) as engine:
        assert_answers_fill_the_context(engine, METHODS)


def assert_answers_fill_the_context(engine: Engine, methods: Sequence[str]) -> None:
    """Drafts that reach beyond the answer's end would stand at positions that GPT-2 does not have."""
    asked = {"prompt": "a" * 470, "max_length": 512, "temperature": 0, "logit_bias": {"70": 100}}
    plain, *others = answers(engine, [{**asked, "method": method} for method in ("vanilla", *methods)])
    assert len(plain) > 30 and others == [plain] * len(methods)


@pytest.mark.parametrize("method", METHODS)
def test_sampled_equals_vanilla_by_seed(method: str) -> None:
    assert_sampled_equals_vanilla(method)


def assert_sampled_equals_vanilla(method: str, **options: Any) -> None:
    """``options`` are the engine's."""
    warps = {"temperature": 0.7, "top_p": 0.95, "repetition_penalty": 1.1}
    with tiny_engine(methods=[method], **options) as engine:
        plain = answers(engine, requests(method="vanilla", **warps))
        assert answers(engine, requests(method=method, **warps)) == plain
        assert [answers(engine, [request])[0] for request in requests(method=method, **warps)] == plain


@pytest.mark.parametrize("method", METHODS)
def test_preempted_requests_go_on_with_the_same_answer(method: str) -> None:
    assert_preemption_changes_nothing(method)


def assert_preemption_changes_nothing(method: str, **options: Any) -> None:
    """``options`` are the engine's."""
    asked = [request for _ in range(3) for request in requests(temperature=0, method=method)]
    with tiny_engine(methods=[method], **options) as engine:
        plain = answers(engine, asked)
    with tiny_engine(methods=[method], kv_tokens=352, **options) as engine:
        assert answers(engine, asked) == plain
        assert engine.status().preemptions > 0
        assert engine.status().free_pages == engine.status().total_pages


def test_a_repeated_text_is_drafted_and_accepted() -> None:
    """Forced by a logit bias to repeat one token, n-grams must reach several tokens a step."""
    with tiny_engine(methods=METHODS) as engine:
        for method in METHODS:
            params = {"temperature": 0, "max_new_tokens": 40, "method": method, "logit_bias": {"70": 100}}
            last = list(engine.generate("FFFFFFFFFFFF", **params))[-1]
            assert last.summary is not None
            assert last.completion_tokens == 40
            assert last.summary.tokens_per_step > 2.5
