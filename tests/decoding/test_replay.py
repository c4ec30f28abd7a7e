"""A replay on known answers takes the steps that decoding takes."""

from pathlib import Path

import pytest

from benchmarks.answers import vanilla_answers
from benchmarks.replay import replay
from protocol.generation import DraftSettings
from tests.support.tiny import tiny_engine
from traces.datasets import Dataset, Question
from workers.decoding.registry import make_method
from workers.engine import Engine

QUESTIONS = [
    Question(question_id=n, turns=[text, "again"]) for n, text in enumerate(["abcabcabc", "hello hello hello"])
]


@pytest.fixture(scope="module")
def engine():
    with tiny_engine(methods=["ngram"]) as engine:
        yield engine


def test_replayed_steps_are_the_decoded_ones(engine: Engine, tmp_path: Path) -> None:
    known = vanilla_answers(engine, [Dataset(name="set", questions=QUESTIONS)], 40, tmp_path / "answers.jsonl")
    draft = DraftSettings(nodes=7)
    assert [turn.number for turn in known] == [0, 1, 0, 1]
    for turn in known:
        options = {"draft": draft.model_dump(), "temperature": 0, "max_new_tokens": 40}
        events = list(engine.generate(turn.messages, method="ngram", **options))
        decoded = [len(event.step.threads[0].token_ids) for event in events if event.step]
        assert replay(make_method("ngram"), turn.answer, draft) == decoded
        assert max(decoded) > 1


def test_answers_are_decoded_once_for_each_length(engine: Engine, tmp_path: Path) -> None:
    datasets, file = [Dataset(name="set", questions=QUESTIONS)], tmp_path / "answers.jsonl"
    first = vanilla_answers(engine, datasets, 20, file)
    steps = engine.counters.steps
    assert vanilla_answers(engine, datasets, 20, file) == first
    assert engine.counters.steps == steps
    assert all(len(turn.answer.answer) <= 5 for turn in vanilla_answers(engine, datasets, 5, file))
