"""``python -m benchmarks.forking_quality``: how good the answers of a model are that was trained to fork.

They are read from the file of ``benchmarks.forking`` and stand beside the base model's own answers to the same
questions: log-likelihood under the base model, length, repetition, headings that occur twice, control tokens in the
text. The report prints some answers in full.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers.utils import logging as transformers_logging

from benchmarks.answers import vanilla_answers
from benchmarks.forking import Answered
from protocol.generation import ChatMessage
from traces.datasets import Dataset, load_datasets
from training.answers import TOGETHER
from training.apar_data import repeated_headings, repetition
from training.kept import Kept
from workers.engine import Engine
from workers.forking import NAMES
from workers.model.checkpoint import Checkpoint, load_checkpoint
from workers.model.devices import find_device
from workers.prompts import PromptRenderer
from workers.warm_up import WarmUp

PRINTED = 10  # answers in full
LETTERS = 60  # of a question in the table


@dataclass(frozen=True)
class Judged:
    """An answer, and what is counted of it; ``likelihood`` is the mean logarithm a token, natural."""

    whose: str
    question: str
    text: str
    tokens: int
    likelihood: float

    @property
    def repetition(self) -> float:
        return repetition(self.text)

    @property
    def headings(self) -> int:
        """How many stand there for the second time."""
        return repeated_headings(self.text)


def main(
    answers: Annotated[Path, typer.Option(help="JSONL of benchmarks.forking")] = Path("runs/forking.jsonl"),
    setting: Annotated[str, typer.Option(help="whose answers; those of other drafts are the same")] = "apar",
    base_path: Annotated[str, typer.Option(help="the model that was trained")] = "smollm2-135m",
    datasets: Annotated[str, typer.Option(help="names or JSONL files, separated by commas")] = "vicuna_bench,mt_bench",
    new_tokens: Annotated[int, typer.Option(min=1, help="of the base model's answers")] = 512,
    base_answers: Annotated[Path, typer.Option(help="JSONL of the base model's answers")] = Path("runs/answers.jsonl"),
    report: Annotated[Path, typer.Option(help="Markdown")] = Path("runs/forking.md"),
) -> None:
    """Judge all first turns that were answered, and write the report."""
    transformers_logging.disable_progress_bar()
    forked = [answer for answer in Kept(answers, Answered).found.values() if answer.setting == setting]
    mine = {(answer.dataset, answer.question): answer.text for answer in forked}
    asked = [_first_turns(dataset, mine) for dataset in load_datasets(datasets.split(","))]
    with Engine.load(base_path, kv_tokens=65536, max_requests=TOGETHER) as engine:
        WarmUp(engine, base_path, measure=False).wait()
        turns = vanilla_answers(engine, asked, new_tokens, base_answers)
    device = find_device(None)
    judge = Judge(load_checkpoint(base_path, dtype=torch.float32, device=device))
    judged: list[tuple[Judged, Judged]] = []
    for turn in turns:
        question = turn.messages[0]["content"]
        text = mine[turn.dataset, str(turn.question_id)]
        judged.append((judge(setting, question, text), judge("base", question, turn.answer.text)))
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text("\n".join(_lines(judged)) + "\n", "utf-8")
    print("\n".join(_table(judged)))


def _first_turns(dataset: Dataset, answered: dict[tuple[str, str], str]) -> Dataset:
    """The questions that were answered, without their later turns."""
    kept = [one for one in dataset.questions if (dataset.name, str(one.question_id)) in answered]
    return Dataset(name=dataset.name, questions=[one.model_copy(update={"turns": one.turns[:1]}) for one in kept])


class Judge:
    """The base model, as a judge of texts."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._model: Any = checkpoint.model
        self._tokenizer = checkpoint.tokenizer
        self._renderer = PromptRenderer(checkpoint.tokenizer, checkpoint.name)

    @torch.inference_mode()
    def __call__(self, whose: str, question: str, text: str) -> Judged:
        prompt = self._renderer.render([ChatMessage(role="user", content=question)]).token_ids
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        output = self._model(torch.tensor([prompt + ids], device=self._model.device), logits_to_keep=len(ids) + 1)
        scores = output.logits[0, :-1].float().log_softmax(-1).cpu()
        likelihood = scores.gather(1, torch.tensor(ids)[:, None]).mean().item() if ids else 0.0
        return Judged(whose, question, text, len(ids), likelihood)


def _table(judged: Sequence[tuple[Judged, Judged]]) -> Iterator[str]:
    """A line a model: means over the answers, and sums."""
    yield "| answers of | answers | log-likelihood a token | tokens | repetition | headings twice | control tokens |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for column in zip(*judged, strict=True):
        count = len(column)
        likelihood = sum(one.likelihood for one in column) / count
        tokens = sum(one.tokens for one in column) / count
        repeated = sum(one.repetition for one in column) / count
        headings = sum(one.headings for one in column)
        controls = sum(one.text.count(name) for one in column for names in NAMES for name in names)
        counts = f"{likelihood:.3f} | {tokens:.0f} | {repeated:.1%} | {headings} | {controls}"
        yield f"| {column[0].whose} | {count} | {counts} |"


def _answers_table(judged: Sequence[tuple[Judged, Judged]]) -> Iterator[str]:
    """A line a question; of each pair of columns the second is the base model's."""
    yield "| question | log-likelihood a token | base | tokens | base | repetition | base | headings twice | base |"
    yield "|---|" + "---:|" * 8
    for pair in judged:
        question = " ".join(pair[0].question.split())[:LETTERS].replace("|", "\\|")
        likelihood = " | ".join(f"{one.likelihood:.3f}" for one in pair)
        tokens = " | ".join(str(one.tokens) for one in pair)
        repeated = " | ".join(f"{one.repetition:.1%}" for one in pair)
        headings = " | ".join(str(one.headings) for one in pair)
        yield f"| {question} | {likelihood} | {tokens} | {repeated} | {headings} |"


def _lines(judged: Sequence[tuple[Judged, Judged]]) -> Iterator[str]:
    yield "# Answers of threads beside the base model's own\n"
    yield from _table(judged)
    yield "\nRepetition: the share of sequences of six words that have occurred before in the same answer."
    yield "\n## Each answer, and the base model's own\n"
    yield from _answers_table(judged)
    for mine, _ in judged[:: max(1, len(judged) // PRINTED)][:PRINTED]:
        yield f"\n## {' '.join(mine.question.split())}\n\n{mine.text}"


if __name__ == "__main__":
    typer.run(main)
