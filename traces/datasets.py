"""Benchmark questions: the bundled sets by name, or by path any JSONL file of FastChat's form, or of prompts alone."""

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

BUNDLED = ("vicuna_bench", "mt_bench")
PROMPT_KEYS = ("prompt", "instruction", "question")  # HumanEval's and prompt lists', AlpacaEval's, GSM8K's
ID_KEYS = ("task_id", "id")


class DatasetError(Exception):
    """A data set that cannot be used; the message is one readable line."""


class Question(BaseModel):
    """One line of a data set. Keys beyond these are kept."""

    model_config = ConfigDict(extra="allow")

    question_id: int | str
    category: str = ""
    turns: list[str] = Field(min_length=1)

    @classmethod
    def of(cls, line: Any, number: int) -> "Question":
        """A line of FastChat's form, or of one that holds a single prompt; a line without an id gets its number."""
        if isinstance(line, dict) and "turns" not in line:
            prompts = [line[key] for key in PROMPT_KEYS if key in line]
            ids = [line[key] for key in ID_KEYS if key in line]
            line = {"question_id": [*ids, number][0], **line, **({"turns": prompts[:1]} if prompts else {})}
        return cls.model_validate(line)


class Dataset(BaseModel):
    """Questions in the order of their file, each with an id of its own."""

    name: str
    questions: list[Question]

    def sample(self, per_category: int | None) -> "Dataset":
        """As many questions of every category, evenly spread over it; None takes all."""
        if per_category is None:
            return self
        kept: list[Question] = []
        for category in dict.fromkeys(question.category for question in self.questions):
            members = [question for question in self.questions if question.category == category]
            kept += members[:: max(1, len(members) // per_category)][:per_category]
        return Dataset(name=self.name, questions=kept)


def load_datasets(sources: list[str]) -> list[Dataset]:
    """Load every source once, in order.

    Raises:
        DatasetError: an unknown name, a file that is no data set, or two sets of the same name.
    """
    datasets = [_load(source) for source in dict.fromkeys(sources)]
    names = [dataset.name for dataset in datasets]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise DatasetError(f"two data sets are called {min(repeated)}: their results would share a file")
    return datasets


def _load(source: str) -> Dataset:
    path = Path(source)
    text = _read(source, path)
    questions = [_parse(line, number, f"{source}, line {number}") for number, line in _lines(text)]
    ids = [question.question_id for question in questions]
    if len(set(ids)) < len(ids):
        raise DatasetError(f"{source}: a question_id occurs twice")
    if not questions:
        raise DatasetError(f"{source}: no questions in it")
    return Dataset(name=path.stem, questions=questions)


def _read(source: str, path: Path) -> str:
    if source in BUNDLED:
        return (files("traces") / "data" / f"{source}.jsonl").read_text("utf-8")
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        known = ", ".join(BUNDLED)
        raise DatasetError(f"no data set {source!r}: known are {known}, or the path of a JSONL file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"cannot read {source}: {error}") from None


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines with something on them, numbered from 1. Only a line feed ends one: strings may hold U+2028."""
    return ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def _parse(line: str, number: int, where: str) -> Question:
    try:
        return Question.of(json.loads(line), number)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DatasetError(f"{where}: {key or 'question'}: {first['msg'].lower()}") from None
    except ValueError as error:
        raise DatasetError(f"{where}: not valid JSON: {error}") from None
