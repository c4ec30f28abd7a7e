"""The model's own greedy answers to benchmark questions, decoded once by vanilla, in batches, and kept in a file.

What every exact method would answer as well: replays and learning curves start from them.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock

from protocol.generation import ChatMessage
from traces.datasets import Dataset, Question
from workers.engine import Engine

TOGETHER = 32

Key = tuple[str, int, tuple[int, ...]]  # model, new tokens, prompt


@dataclass(frozen=True)
class Answer:
    """A greedy answer: token ids of the rendered prompt and of the answer, and its text."""

    model: str
    new_tokens: int
    prompt: list[int]
    answer: list[int]
    text: str

    @property
    def key(self) -> Key:
        return self.model, self.new_tokens, tuple(self.prompt)


@dataclass(frozen=True)
class Turn:
    """A turn of a benchmark question with its answer; ``messages`` is the conversation up to it."""

    dataset: str
    category: str
    question_id: int | str
    number: int
    messages: list[dict[str, str]]
    answer: Answer


class AnswerFile:
    """A JSONL file of answers; each is appended when it is there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = Lock()
        lines = path.read_text().splitlines() if path.is_file() else []
        self.found = {answer.key: answer for answer in (Answer(**json.loads(line)) for line in lines)}

    def add(self, answer: Answer) -> None:
        with self._lock:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps(asdict(answer)) + "\n")
            self.found[answer.key] = answer


def vanilla_answers(engine: Engine, datasets: Sequence[Dataset], new_tokens: int, path: Path) -> list[Turn]:
    """Greedy answers of at most ``new_tokens`` tokens to every turn, those in the file ``path`` without decoding."""
    file = AnswerFile(path)
    asked = [(dataset.name, question) for dataset in datasets for question in dataset.questions]
    with ThreadPoolExecutor(TOGETHER) as pool:
        turns = pool.map(lambda one: list(_turns(engine, one[0], one[1], new_tokens, file)), asked)
        return [turn for turns_of_one in turns for turn in turns_of_one]


def _turns(engine: Engine, dataset: str, question: Question, new_tokens: int, file: AnswerFile) -> Iterator[Turn]:
    messages: list[dict[str, str]] = []
    for number, text in enumerate(question.turns):
        messages.append({"role": "user", "content": text})
        answer = _answer(engine, messages, new_tokens, file)
        yield Turn(dataset, question.category, question.question_id, number, list(messages), answer)
        messages.append({"role": "assistant", "content": answer.text})


def _answer(engine: Engine, messages: list[dict[str, str]], new_tokens: int, file: AnswerFile) -> Answer:
    prompt = engine.renderer.render([ChatMessage.model_validate(message) for message in messages]).token_ids
    if known := file.found.get((engine.name, new_tokens, tuple(prompt))):
        return known
    tokens: list[int] = []
    text = ""
    for event in engine.generate(messages, method="vanilla", temperature=0, max_new_tokens=new_tokens):
        text += event.text
        if event.step:
            tokens += event.step.threads[0].token_ids
    answer = Answer(engine.name, new_tokens, prompt, tokens, text)
    file.add(answer)
    return answer
