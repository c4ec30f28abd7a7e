"""Threads of one request: every thread's tokens are plain greedy decoding of its own path, whatever runs beside it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.verify import TIE
from protocol.legacy_trace import legacy_trace
from protocol.trace import RequestTrace
from tests.support.families import tiny_model
from tests.support.tokenizers import byte_tokenizer
from workers.engine import Engine
from workers.model.checkpoint import Checkpoint
from workers.request import Event

FORK, CHILD, EOS = 263, 264, 2
METHODS = ("apar", "apar+ngram", "apar+lookahead")
PROMPT = "Name some things."


@cache
def forking_checkpoint() -> Checkpoint:
    return Checkpoint("tiny", tiny_model("llama", 1), byte_tokenizer(added=["[Fork]", "[Child]"]))


@cache
def forking_engine() -> Engine:
    return Engine(forking_checkpoint, methods=METHODS, kv_tokens=8192)


@dataclass
class Told:
    """What a thread was told by its events."""

    parent: int | None = None
    tokens: list[int] = field(default_factory=list)
    text: str = ""


def threads_of(events: list[Event]) -> dict[int, Told]:
    threads: dict[int, Told] = {}
    for event in events:
        for step in event.step.threads if event.step else []:
            told = threads.setdefault(step.thread, Told(step.parent))
            told.tokens += step.token_ids
            told.text += step.text
    return threads


@dataclass
class Path:
    """A thread's whole path; its own tokens start at ``start``."""

    tokens: list[int]
    start: int

    @property
    def forks(self) -> list[int]:
        return [place for place, token in enumerate(self.tokens) if token == FORK and place >= self.start]


Paths = dict[tuple[int, ...], Path]


def paths_of(threads: dict[int, Told], prompt: list[int]) -> Paths:
    """Each thread's path by its number among its siblings, behind its parent's."""
    places: dict[int, tuple[int, ...]] = {0: ()}
    paths = {(): Path(prompt + threads[0].tokens, len(prompt))}
    for number in sorted(threads)[1:]:
        parent = threads[number].parent
        assert parent is not None
        above = places[parent]
        child = sum(place[:-1] == above for place in paths if place)
        prefix = [*paths[above].tokens[: paths[above].forks[child] + 1], CHILD]
        places[number] = (*above, child)
        paths[places[number]] = Path(prefix + threads[number].tokens, len(prefix))
    return paths


def in_reading_order(paths: Paths, place: tuple[int, ...] = ()) -> list[int]:
    path, tokens = paths[place], []
    for index in range(path.start, len(path.tokens)):
        if path.tokens[index] != FORK:
            tokens.append(path.tokens[index])
        elif (child := (*place, path.forks.index(index))) in paths:
            tokens += in_reading_order(paths, child)
    return tokens


@torch.inference_mode()
def assert_greedy(path: Path, depth: int, *, bias: float, max_depth: int = 2, max_children: int = 64) -> None:
    """Each own token is what plain decoding of the path alone chooses, with the bans."""
    logits = forking_checkpoint().model(torch.tensor([path.tokens])).logits[0].float()
    for place in range(path.start, len(path.tokens)):
        row = logits[place - 1].clone()
        row[FORK] += bias
        row[CHILD] = -torch.inf
        forked = sum(fork < place for fork in path.forks)
        if depth >= max_depth or forked >= max_children or path.tokens[place - 1] in (FORK, CHILD):
            row[FORK] = -torch.inf
        assert row[path.tokens[place]] >= row.max() - TIE


def ask(engine: Engine, **params: Any) -> tuple[str, Paths]:
    """Text and paths of an answer; nothing is held afterwards."""
    options = {"method": "apar", "temperature": 0, "max_new_tokens": 40, "trace": "full", **params}
    events = list(engine.generate(PROMPT, **options))
    assert engine.status().free_pages == engine.status().total_pages
    prompt = engine.renderer.encode(PROMPT).token_ids
    return ascii_of("".join(event.text for event in events)), paths_of(threads_of(events), prompt)


def decoded(tokens: list[int]) -> str:
    return ascii_of(forking_checkpoint().tokenizer.decode(tokens, skip_special_tokens=True))


def ascii_of(text: str) -> str:
    """A random model also forks in the middle of a character."""
    return "".join(letter for letter in text if letter < "\x80")


def test_threads_fork_and_their_text_is_in_reading_order() -> None:
    text, paths = ask(forking_engine(), logit_bias={FORK: 6.0})
    assert len(paths) > 3
    assert text == decoded(in_reading_order(paths))
    for place, path in paths.items():
        assert_greedy(path, 1 + len(place), bias=6.0)


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
    bias: float, max_depth: int, max_children: int, max_threads: int, method: str, new_tokens: int
) -> None:
    options = {"max_depth": max_depth, "max_children": max_children, "max_new_tokens": new_tokens}
    engine, biased = forking_engine(), {"logit_bias": {FORK: bias}, "max_total_tokens": 1500}
    text, paths = ask(engine, method=method, max_threads=max_threads, **options, **biased)
    if sum(len(path.tokens) - path.start for path in paths.values()) < 1500:
        assert text == decoded(in_reading_order(paths))
        assert (text, paths) == ask(engine, **options, **biased)
    for place, path in list(paths.items())[:20]:
        assert_greedy(path, 1 + len(place), bias=bias, max_depth=max_depth, max_children=max_children)


def test_apars_own_trace_tells_the_tree_and_every_snapshot() -> None:
    engine = forking_engine()
    events = list(
        engine.generate(PROMPT, method="apar", temperature=0, max_new_tokens=40, trace="full", logit_bias={FORK: 6.0})
    )
    header, summary = events[0].header, events[-1].summary
    assert header and summary
    steps = [event.step for event in events if event.step]
    legacy = legacy_trace(RequestTrace(header=header, steps=steps, summary=summary))
    last = legacy.ret_input_ids[-1]
    paths = paths_of(threads_of(events), engine.renderer.encode(PROMPT).token_ids)
    assert sorted(last) == sorted(path.tokens for path in paths.values())
    assert ascii_of(legacy.responses[-1][0]) == decoded(in_reading_order(paths))
    for count, live in zip(legacy.dynamic_bs, legacy.g_to_i, strict=True):
        assert sorted(live.values()) == list(range(count))

    def spans(node: dict[str, Any] | None) -> Iterator[list[int]]:
        if node:
            yield last[node["gid"]][node["start"] : node["termination"]]
            yield from spans(node["detail"])
            yield from spans(node["next"])

    told = [token for span in spans(legacy.global_root[-1][0]) for token in span if token != FORK]  # at an answer's end
    assert told == in_reading_order(paths)
