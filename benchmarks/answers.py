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

TOGETHER = 8

Key = tuple[str, int, str, int | str, int]  # model, new tokens, data set, question, turn


@dataclass(frozen=True)
class Answer:
    """One turn: the conversation up to it, token ids of the rendered prompt and of the greedy answer, and its text."""

    model: str
    new_tokens: int
    dataset: str
    category: str
    question_id: int | str
    turn: int
    messages: list[dict[str, str]]
    prompt: list[int]
    answer: list[int]
    text: str

    @property
    def key(self) -> Key:
        return self.model, self.new_tokens, self.dataset, self.question_id, self.turn


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


def vanilla_answers(engine: Engine, datasets: Sequence[Dataset], new_tokens: int, path: Path) -> list[Answer]:
    """Greedy answers of at most ``new_tokens`` tokens to every turn, those in the file ``path`` without decoding."""
    file = AnswerFile(path)
    asked = [(dataset.name, question) for dataset in datasets for question in dataset.questions]
    with ThreadPoolExecutor(TOGETHER) as pool:
        turns = pool.map(lambda one: list(_turns(engine, one[0], one[1], new_tokens, file)), asked)
        return [answer for answers in turns for answer in answers]


def _turns(engine: Engine, dataset: str, question: Question, new_tokens: int, file: AnswerFile) -> Iterator[Answer]:
    messages: list[dict[str, str]] = []
    for turn, text in enumerate(question.turns):
        messages.append({"role": "user", "content": text})
        known = file.found.get((engine.name, new_tokens, dataset, question.question_id, turn))
        if known is None:
            known = _decode(engine, dataset, question, turn, messages, new_tokens)
            file.add(known)
        messages.append({"role": "assistant", "content": known.text})
        yield known


def _decode(
    engine: Engine, dataset: str, question: Question, turn: int, messages: list[dict[str, str]], new_tokens: int
) -> Answer:
    tokens: list[int] = []
    text = ""
    for event in engine.generate(messages, method="vanilla", temperature=0, max_new_tokens=new_tokens):
        text += event.text
        if event.step:
            tokens += event.step.threads[0].token_ids
    prompt = engine.renderer.render([ChatMessage.model_validate(message) for message in messages]).token_ids
    return Answer(
        model=engine.name,
        new_tokens=new_tokens,
        dataset=dataset,
        category=question.category,
        question_id=question.question_id,
        turn=turn,
        messages=list(messages),
        prompt=prompt,
        answer=tokens,
        text=text,
    )
