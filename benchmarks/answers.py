"""Benchmark questions with the model's own greedy answers, turn by turn."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from traces.datasets import Dataset, Question
from training.answers import TOGETHER, Answer, AnswerFile, Messages
from workers.engine import Engine


@dataclass(frozen=True)
class Turn:
    """A turn of a benchmark question with its answer; ``messages`` is the conversation up to it."""

    dataset: str
    category: str
    question_id: int | str
    number: int
    messages: Messages
    answer: Answer


def vanilla_answers(engine: Engine, datasets: Sequence[Dataset], new_tokens: int, path: Path) -> list[Turn]:
    """Greedy answers of at most ``new_tokens`` tokens to every turn, those in the file ``path`` without decoding."""
    file = AnswerFile(path)
    asked = [(dataset.name, question) for dataset in datasets for question in dataset.questions]
    with ThreadPoolExecutor(TOGETHER) as pool:
        turns = pool.map(lambda one: list(_turns(engine, one[0], one[1], new_tokens, file)), asked)
        return [turn for turns_of_one in turns for turn in turns_of_one]


def _turns(engine: Engine, dataset: str, question: Question, new_tokens: int, file: AnswerFile) -> Iterator[Turn]:
    messages: Messages = []
    for number, text in enumerate(question.turns):
        messages.append({"role": "user", "content": text})
        answer = file.answer(engine, messages, new_tokens)
        yield Turn(dataset, question.category, question.question_id, number, list(messages), answer)
        messages.append({"role": "assistant", "content": answer.text})
