"""A tiny model's own answers, from which every trainer learns."""

from itertools import chain

import pytest

from tests.support.tiny import tiny_engine
from training.answers import Answer, AnswerFile, answers

PROMPTS = [f"count {number} and {number + 1}" for number in range(24)]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    file = AnswerFile(tmp_path_factory.mktemp("answers") / "answers.jsonl")
    with tiny_engine() as engine:
        return list(chain.from_iterable(answers(engine, PROMPTS, 24, file)))
