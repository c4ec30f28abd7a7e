"""Threads of one request: every thread's tokens are plain greedy decoding of its own path, whatever runs beside it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event as Flag
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.generation import GenerateParams
from protocol.legacy_trace import legacy_trace
from protocol.trace import RequestTrace
from tests.decoding.test_medusa import heads_for
from tests.decoding.test_ppd import written
from tests.support.serving import wait_until
from tests.support.threads import Paths, assert_greedy, in_reading_order, paths_of, threads_of
from tests.support.tiny import FORK, forking_checkpoint
from workers.engine import Engine
from workers.model.pages import PAGE_ROWS
from workers.request import Event

EOS = 2
METHODS = ("apar", "apar+ngram", "apar+lookahead", "apar+medusa", "apar+ppd", "apar+medusa+ngram")
PROMPT = "Name some things."


@pytest.fixture(scope="module")
def forking_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("adapters")
    adapters = {"medusa": heads_for("llama", folder), "ppd": written(folder / "ppd")}
    with Engine(forking_checkpoint, methods=METHODS, kv_tokens=8192, adapters=adapters) as engine:
        yield engine


def ask(engine: Engine, **params: Any) -> tuple[str, Paths]:
    """Text and paths of an answer."""
    options = {"method": "apar", "temperature": 0, "max_new_tokens": 40, "trace": "full", **params}
    events = list(engine.generate(PROMPT, **options))
    prompt = engine.renderer.encode(PROMPT).token_ids
    return ascii_of("".join(event.text for event in events)), paths_of(threads_of(events), prompt)


def decoded(tokens: list[int]) -> str:
    return ascii_of(forking_checkpoint().tokenizer.decode(tokens, skip_special_tokens=True))


def ascii_of(text: str) -> str:
    """A random model also forks in the middle of a character."""
    return "".join(letter for letter in text if letter < "\x80")


def test_threads_fork_and_their_text_is_in_reading_order(forking_engine: Engine) -> None:
    text, paths = ask(forking_engine, logit_bias={FORK: 6.0})
    assert len(paths) > 3
    assert text == decoded(in_reading_order(paths))
    for place, path in paths.items():
        assert_greedy(forking_checkpoint().model, path, 1 + len(place), bias=6.0)


@given(
    bias=st.floats(3, 12),
    max_depth=st.integers(1, 4),
    max_children=st.integers(0, 5),
    max_threads=st.sampled_from([1, 2, 32]),
    method=st.sampled_from(METHODS),
    new_tokens=st.integers(1, 40),
)
@settings(max_examples=25, deadline=None)
def test_whatever_forks_every_thread_decodes_its_own_path(
    forking_engine: Engine,
    bias: float,
    max_depth: int,
    max_children: int,
    max_threads: int,
    method: str,
    new_tokens: int,
) -> None:
    options = {"max_depth": max_depth, "max_children": max_children, "max_new_tokens": new_tokens}
    engine, biased = forking_engine, {"logit_bias": {FORK: bias}, "max_total_tokens": 1500}
    text, paths = ask(engine, method=method, max_threads=max_threads, **options, **biased)
    if sum(len(path.tokens) - path.start for path in paths.values()) < 1500:
        assert text == decoded(in_reading_order(paths))
        assert (text, paths) == ask(engine, **options, **biased)
    for place, path in list(paths.items())[:20]:
        assert_greedy(
            forking_checkpoint().model, path, 1 + len(place), bias=bias, max_depth=max_depth, max_children=max_children
        )


@pytest.mark.parametrize(("method", "depth"), [("apar", 2), ("apar+medusa", 2), ("apar", 3)])
def test_apars_own_trace_tells_the_tree_and_every_snapshot(forking_engine: Engine, method: str, depth: int) -> None:
    engine = forking_engine
    options: dict[str, Any] = {"method": method, "temperature": 0, "max_new_tokens": 40, "logit_bias": {FORK: 6.0}}
    options |= {"max_depth": depth, "max_children": 10}
    events = list(engine.generate(PROMPT, trace="full", **options))
    header, summary = events[0].header, events[-1].summary
    assert header and summary
    steps = [event.step for event in events if event.step]
    legacy = legacy_trace(RequestTrace(header=header, steps=steps, summary=summary))
    last = legacy.ret_input_ids[-1]
    paths = paths_of(threads_of(events), engine.renderer.encode(PROMPT).token_ids)
    told = sorted(path for path in last if path[-1] != FORK)  # a child without room says nothing
    assert told == sorted(path.tokens for path in paths.values() if path.tokens[-1] != FORK)
    assert ascii_of(legacy.responses[-1][0]) == decoded(in_reading_order(paths))
    for count, live in zip(legacy.dynamic_bs, legacy.g_to_i, strict=True):
        assert sorted(live.values()) == list(range(count))

    def spans(node: dict[str, Any] | None) -> Iterator[list[int]]:
        if node:
            yield last[node["gid"]][node["start"] : node["termination"]]
            yield from spans(node["detail"])
            yield from spans(node["next"])

    read = [token for span in spans(legacy.global_root[-1][0]) for token in span if token != FORK]  # at an answer's end
    assert read == in_reading_order(paths)


def test_apars_own_rule_bans_forks_while_many_threads_live(forking_engine: Engine) -> None:
    options: dict[str, Any] = {"method": "apar", "temperature": 0, "max_new_tokens": 60, "logit_bias": {FORK: 8.0}}
    events = list(forking_engine.generate(PROMPT, max_live_threads=3, **options))
    steps = [event.step.threads for event in events if event.step]
    assert max(map(len, steps)) == 3
    assert len(threads_of(events)) < len(ask(forking_engine, **options)[1])


@pytest.mark.parametrize("max_threads", [2, 32])
def test_eight_requests_together_answer_as_each_alone(forking_engine: Engine, max_threads: int) -> None:
    def one(number: int) -> tuple[str, Paths]:
        method = METHODS[number % len(METHODS)]
        return ask(forking_engine, method=method, max_threads=max_threads, logit_bias={FORK: 5.0 + number % 3})

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(one, range(8)))
    assert together == [one(number) for number in range(8)]


def test_pages_of_a_thread_are_free_in_the_step_in_which_it_ends(forking_engine: Engine) -> None:
    held: list[tuple[int, int]] = []
    ended = Flag()

    def look(event: Event) -> None:  # between two steps
        status = forking_engine.status()
        live = {page for thread in request.threads if not thread.finished for page in thread.table.pages}
        held.append((status.total_pages - status.free_pages, len(live)))
        if event.last:
            ended.set()

    params = {"prompt": PROMPT, "method": "apar", "temperature": 0, "max_new_tokens": 60, "logit_bias": {FORK: 8.0}}
    request = forking_engine.submit(GenerateParams(**params, max_children=6), look)
    assert ended.wait(20)
    assert len(held) > 20
    assert all(taken == live for taken, live in held)
    assert max(taken for taken, _ in held) < sum(len(thread.token_ids) for thread in request.threads) // PAGE_ROWS


def test_a_full_cache_in_the_middle_of_many_threads_loses_nothing(forking_engine: Engine) -> None:
    options = {"method": "apar", "max_new_tokens": 60, "max_children": 10, "logit_bias": {FORK: 8.0}}
    with Engine(forking_checkpoint, methods=("apar",), kv_tokens=12 * PAGE_ROWS) as small:
        assert ask(small, **options) == ask(forking_engine, **options)
        assert small.status().preemptions


def test_an_answer_may_end_before_it_begins(forking_engine: Engine) -> None:
    events = list(forking_engine.generate(PROMPT, method="apar", temperature=0, logit_bias={EOS: 100.0}))
    assert [event.finish_reason for event in events] == ["stop"]
    assert events[0].completion_tokens == 1
    assert forking_engine.status().free_pages == forking_engine.status().total_pages


def test_a_client_that_leaves_gives_everything_back(forking_engine: Engine) -> None:
    events = forking_engine.generate(PROMPT, method="apar", temperature=0, max_new_tokens=300, logit_bias={FORK: 8.0})
    for _ in range(12):
        next(events)
    events.close()
    wait_until(lambda: forking_engine.status().free_pages == forking_engine.status().total_pages)


def test_all_threads_together_have_a_limit(forking_engine: Engine) -> None:
    events = list(
        forking_engine.generate(
            PROMPT, method="apar", temperature=0, max_new_tokens=200, max_total_tokens=50, logit_bias={FORK: 6.0}
        )
    )
    assert events[-1].finish_reason == "length"
    assert 50 <= events[-1].completion_tokens <= 50 + len(threads_of(events))
    assert events[-1].step and all(thread.finish_reason == "length" for thread in events[-1].step.threads)


@pytest.mark.parametrize("where", [0.2, 0.5, 0.8])
def test_a_stop_string_ends_the_text_in_reading_order(forking_engine: Engine, where: float) -> None:
    """Also one that begins in one thread and ends in another."""
    options: dict[str, Any] = {"method": "apar", "temperature": 0, "max_new_tokens": 30, "logit_bias": {FORK: 6.0}}
    whole = "".join(event.text for event in forking_engine.generate(PROMPT, **options))
    for length in (1, 4):
        place = int(where * len(whole))
        stop = whole[place : place + length]
        for max_threads in (1, 32):
            limits = {"max_threads": max_threads, "logprobs": 0}
            events = list(forking_engine.generate(PROMPT, stop=[stop], **limits, **options))
            assert "".join(event.text for event in events) == whole[: whole.index(stop)]
            assert events[-1].finish_reason == "stop"
            reported = decoded([report.token for event in events for report in event.tokens])
            assert ascii_of(whole).startswith(reported[: whole.index(stop)])
        assert forking_engine.status().free_pages == forking_engine.status().total_pages


def test_sampled_threads_are_the_same_whatever_runs_beside_them(forking_engine: Engine) -> None:
    options = {"temperature": 0.9, "seed": 4, "logit_bias": {FORK: 6.0}, "max_new_tokens": 30}
    alone = ask(forking_engine, **options)
    assert len(alone[1]) > 2
    for method in METHODS:
        assert ask(forking_engine, method=method, max_threads=2, **options) == alone


def test_logprobs_are_told_by_thread_and_in_reading_order(forking_engine: Engine) -> None:
    options: dict[str, Any] = {"method": "apar", "temperature": 0, "max_new_tokens": 30, "logit_bias": {FORK: 6.0}}
    events = list(forking_engine.generate(PROMPT, logprobs=0, trace=True, **options))
    steps = [thread for event in events for thread in (event.step.threads if event.step else [])]
    paths = paths_of(threads_of(events), forking_engine.renderer.encode(PROMPT).token_ids)
    assert len(paths) > 2
    assert all(len(step.token_logprobs or []) == len(step.token_ids) for step in steps)
    reported = [report.token for event in events for report in event.tokens]
    assert reported[:-1] == [token for token in in_reading_order(paths)[:-1] if token != EOS]


def test_the_published_whitespace_is_an_option(forking_engine: Engine) -> None:
    options: dict[str, Any] = {"method": "apar", "temperature": 0, "max_new_tokens": 30, "logit_bias": {FORK: 6.0}}
    plain, published = (
        "".join(event.text for event in forking_engine.generate(PROMPT, whitespace=whitespace, **options))
        for whitespace in ("plain", "published")
    )
    assert published.count("\n\n") > plain.count("\n\n")
