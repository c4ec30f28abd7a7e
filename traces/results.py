"""The result file of one data set: a journal while a run goes on, in the order of the questions at its end.

One JSON object a line: the question's own keys, then ``model``, ``method`` (where one was asked for), ``parameters``,
``answers``, ``traces`` and, for a question that failed, ``error``; where the answers left no room for a later turn,
``left_out`` says so, and the question counts as finished. Lines are appended as questions finish, so that a
run that dies loses only what was in flight.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from traces.datasets import Dataset
from traces.settings import RunSettings

Record = dict[str, Any]


class ResultError(Exception):
    """Results that cannot be continued; the message is one readable line."""


def is_finished(record: Record) -> bool:
    """Whether the question was answered to its end, or as far as its turns fit into the context."""
    return "left_out" in record or ("error" not in record and len(record["traces"]) == len(record["turns"]))


class ResultFile:
    """``<folder>/<dataset>.jsonl``."""

    def __init__(self, folder: Path, dataset: Dataset) -> None:
        self.path = folder / f"{dataset.name}.jsonl"
        self._dataset = dataset

    def restore(self, settings: RunSettings) -> set[int | str]:
        """Keep what an earlier run finished, drop failures and a half-written last line; the ids that are done.

        Raises:
            ResultError: the earlier run asked another model, or in another way.
        """
        if not self.path.exists():
            return set()
        questions = {question.question_id: question for question in self._dataset.questions}
        kept: dict[int | str, Record] = {}
        for record in self:
            self._check(record, settings)
            question = questions.get(record["question_id"])
            if question is None or question.turns != record["turns"]:
                continue
            if is_finished(record) and settings.satisfied_by(record):
                kept[question.question_id] = record
        self._replace(kept.values())
        return set(kept)

    def append(self, record: Record) -> None:
        """Write one finished or failed question."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(_line(record))

    def sort(self) -> None:
        """Bring the lines into the order of the questions."""
        place = {question.question_id: index for index, question in enumerate(self._dataset.questions)}
        records = {record["question_id"]: record for record in self}
        self._replace(sorted(records.values(), key=lambda record: place[record["question_id"]]))

    def __iter__(self) -> Iterator[Record]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):  # a run killed while writing leaves a last line without its end
                    yield self._parse(line)

    def _parse(self, line: bytes) -> Record:
        try:
            record: Record = json.loads(line)
            _ = record["question_id"], record["turns"], record["traces"], record["model"]
            return record
        except (ValueError, KeyError, TypeError):
            raise ResultError(f"{self.path} is no result of get_trace: choose another --save-path") from None

    def _check(self, record: Record, settings: RunSettings) -> None:
        for key, value in settings.identity().items():
            if record.get(key) != value:
                raise ResultError(
                    f"{self.path} was made with {key} {record.get(key)!r}, not {value!r}: choose another --save-path"
                )

    def _replace(self, records: Iterable[Record]) -> None:
        """Write all lines anew: the file is at every moment either the old or the new one."""
        fresh = self.path.with_suffix(".jsonl.new")
        with fresh.open("wb") as file:
            file.writelines(_line(record) for record in records)
        os.replace(fresh, self.path)


def _line(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"
