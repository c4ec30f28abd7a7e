"""``python -m benchmarks.forking``: what threads bring on a model that was trained to fork (APAR, Liu et al. 2024).

First turns are answered by threads, with and without drafts in them. Printed by category: how many answers fork, tokens
a step, the most keys and values held at a time beside those of the same text decoded in order. With ``--clock`` each
question is also answered by one thread at a time (the same text) and with forks banned, one request after another, with
draft sizes by the tuner, and speeds are printed. Answers are kept (``--out``), so that an interrupted run goes on;
``benchmarks.forking_quality`` reads them.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer
from transformers.utils import logging as transformers_logging

from traces.datasets import Dataset, Question, load_datasets
from training.kept import Kept
from workers.decoding.registry import BASELINE
from workers.engine import Engine
from workers.warm_up import WarmUp

ONE_THREAD = "one thread"
TOGETHER = 8  # requests, where no clock runs
KV_TOKENS = 32768
MANY_THREADS = 30  # an answer that has more loops: its titles come back


@dataclass(frozen=True)
class Answered:
    """A first turn's answer by one setting.

    Attributes:
        alone: whether nothing else ran beside it; otherwise ``seconds`` say nothing.
        threads: how many it had; 1 did not fork.
        kv_peak: most distinct rows of KV at a time; the same text decoded in order needs prompt and tokens.
    """

    dataset: str
    category: str
    question: str
    setting: str
    alone: bool
    seconds: float
    steps: int
    tokens: int
    threads: int
    kv_peak: int
    prompt_tokens: int
    text: str

    @property
    def key(self) -> tuple[str, str, str, bool]:
        return self.dataset, self.question, self.setting, self.alone


def main(
    out: Annotated[Path, typer.Option(help="JSONL of the answers")] = Path("runs/forking.jsonl"),
    model_path: str = "smollm2-135m-apar",
    methods: Annotated[str, typer.Option(help="separated by commas")] = "apar,apar+medusa",
    datasets: Annotated[str, typer.Option(help="names or JSONL files, separated by commas")] = "vicuna_bench,mt_bench",
    per_category: Annotated[int | None, typer.Option(min=1, help="questions; by default all")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="of a thread's path")] = 512,
    clock: Annotated[bool, typer.Option("--clock", help="alone, beside one thread at a time and no fork")] = False,
) -> None:
    """Answer first turns, greedy, and print a table a data set."""
    transformers_logging.disable_progress_bar()
    asked = [dataset.sample(per_category) for dataset in load_datasets(datasets.split(","))]
    names = methods.split(",")
    settings: dict[str, dict[str, Any]] = {name: {"method": name} for name in names}
    if clock:
        settings |= {ONE_THREAD: {"method": names[0], "max_threads": 1}, BASELINE: {"method": BASELINE}}
    kept = Kept(out, Answered)
    with Engine.load(model_path, method=names, kv_tokens=KV_TOKENS, tune=clock) as engine:
        WarmUp(engine, model_path, measure=clock).wait()

        def answer(dataset: Dataset, place: int) -> None:
            for name in [*settings][place % len(settings) :] + [*settings][: place % len(settings)]:
                key = (dataset.name, str(dataset.questions[place].question_id), name, clock)
                if key not in kept.found:
                    options = {"max_new_tokens": new_tokens, **settings[name]}
                    kept.add(_answered(engine, dataset.name, dataset.questions[place], name, clock, options))

        with ThreadPoolExecutor(1 if clock else TOGETHER) as pool:
            for dataset in asked:
                list(pool.map(lambda place, dataset=dataset: answer(dataset, place), range(len(dataset.questions))))
    for dataset in asked:
        keys = [(dataset.name, str(one.question_id), name, clock) for one in dataset.questions for name in settings]
        found = [kept.found[key] for key in keys]
        for line in [*table(found, names), *equalities(found, names)]:
            print(line)


def _answered(
    engine: Engine, dataset: str, question: Question, setting: str, alone: bool, options: dict[str, Any]
) -> Answered:
    messages = [{"role": "user", "content": question.turns[0]}]
    started = perf_counter()
    events = list(engine.generate(messages, temperature=0, **options))
    seconds = perf_counter() - started
    summary = events[-1].summary
    assert summary is not None, "it comes with the last event"
    return Answered(
        dataset,
        question.category,
        str(question.question_id),
        setting,
        alone,
        seconds,
        summary.steps,
        summary.tokens,
        len({thread.thread for event in events if event.step for thread in event.step.threads}),
        summary.kv_peak_tokens,
        events[-1].prompt_tokens,
        "".join(event.text for event in events),
    )


def table(answers: Sequence[Answered], methods: Sequence[str]) -> Iterator[str]:
    """A line a category: how many fork; for each method tokens a step, over all and where it forks; KV; speeds.

    Speeds, where all was answered alone: times of one thread at a time over the method's, and tokens a second over
    those of vanilla decoding. A last line leaves out the questions to which an answer loops, where there are any.
    """
    columns = [column for name in methods for column in (name, "where it forks")] + ["KV peak where it forks"]
    if timed := any(answer.setting == BASELINE for answer in answers):
        columns += [f"{name} {beside}" for name in methods for beside in ("/ one thread", "/ vanilla")]
    yield f"| data set | category | questions | fork | {' | '.join(columns)} |"
    yield "|---|---|---:|---:|" + "---:|" * len(columns)
    for name, mine in _groups(answers):
        questions = {answer.question for answer in mine}
        forked = {answer.question for answer in mine if answer.setting == methods[0] and answer.threads > 1}
        cells = [*_counts(mine, methods, forked), *(_speeds(mine, methods) if timed else [])]
        yield f"| {mine[0].dataset} | {name} | {len(questions)} | {len(forked)} | {' | '.join(cells)} |"


def _groups(answers: Sequence[Answered]) -> Iterator[tuple[str, Sequence[Answered]]]:
    for category in dict.fromkeys(answer.category for answer in answers):
        yield category, [answer for answer in answers if answer.category == category]
    yield "**all**", answers
    looping = {answer.question for answer in answers if answer.threads > MANY_THREADS}
    rest = [answer for answer in answers if answer.question not in looping]
    if looping and rest:
        yield f"**at most {MANY_THREADS} threads**", rest


def equalities(answers: Sequence[Answered], methods: Sequence[str]) -> Iterator[str]:
    """How many answers are the same by every method."""
    first, *others = ({one.question: one.text for one in answers if one.setting == name} for name in methods)
    for name, texts in zip(methods[1:], others, strict=True):
        equal = sum(text == first[question] for question, text in texts.items())
        yield f"{equal} of {len(first)} answers of {name} are those of {methods[0]}"


def _counts(answers: Sequence[Answered], methods: Sequence[str], forked: set[str]) -> Iterator[str]:
    for name in methods:
        mine = [answer for answer in answers if answer.setting == name]
        yield _ratio(mine, lambda one: one.tokens, lambda one: one.steps)
        yield _ratio([one for one in mine if one.question in forked], lambda one: one.tokens, lambda one: one.steps)
    first = [answer for answer in answers if answer.setting == methods[0] and answer.question in forked]
    yield _ratio(first, lambda one: one.kv_peak, lambda one: one.prompt_tokens + one.tokens)


def _speeds(answers: Sequence[Answered], methods: Sequence[str]) -> Iterator[str]:
    def seconds(setting: str) -> float:
        return sum(answer.seconds for answer in answers if answer.setting == setting)

    def pace(setting: str) -> float:
        return sum(answer.tokens for answer in answers if answer.setting == setting) / seconds(setting)

    for name in methods:
        yield f"{seconds(ONE_THREAD) / seconds(name):.2f}x"
        yield f"{pace(name) / pace(BASELINE):.2f}x"


def _ratio(answers: Sequence[Answered], over: Callable[[Answered], int], under: Callable[[Answered], int]) -> str:
    """Of sums."""
    return f"{sum(map(over, answers)) / sum(map(under, answers)):.2f}" if answers else ""


if __name__ == "__main__":
    typer.run(main)
