"""``python -m benchmarks.forking``: what threads bring on a model that was trained to fork (APAR, Liu et al. 2024).

Every question is answered by each setting in turn, alone: with threads, with threads and drafts, with one thread at a
time (the same text), and with forks banned. Printed by category: how many answers fork, tokens a step, speed. Answers
are kept (``--out``), so that an interrupted run goes on; ``benchmarks.forking_quality`` reads them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

from traces.datasets import Question, load_datasets
from training.kept import Kept
from workers.engine import Engine
from workers.warm_up import WarmUp

ONE_THREAD, BANNED = "one thread", "vanilla"
KV_TOKENS = 32768


@dataclass(frozen=True)
class Answered:
    """One question's answer by one setting.

    Attributes:
        threads: how many it had; 1 did not fork.
        kv_peak: most distinct rows of KV at a time; the same text decoded in order needs prompt and tokens.
    """

    dataset: str
    category: str
    question: str
    setting: str
    seconds: float
    steps: int
    tokens: int
    threads: int
    kv_peak: int
    prompt_tokens: int
    text: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.dataset, self.question, self.setting


def main(
    out: Annotated[Path, typer.Option(help="JSONL of the answers")] = Path("runs/forking.jsonl"),
    model_path: str = "smollm2-135m-apar",
    methods: Annotated[str, typer.Option(help="separated by commas")] = "apar,apar+medusa",
    datasets: Annotated[str, typer.Option(help="names or JSONL files, separated by commas")] = "vicuna_bench,mt_bench",
    per_category: Annotated[int | None, typer.Option(min=1, help="questions; by default all")] = None,
    new_tokens: Annotated[int, typer.Option(min=1)] = 512,
) -> None:
    """Answer first turns, greedy, and print a table a data set."""
    asked = [dataset.sample(per_category) for dataset in load_datasets(datasets.split(","))]
    names = methods.split(",")
    settings: dict[str, dict[str, Any]] = {name: {"method": name} for name in names}
    settings |= {ONE_THREAD: {"method": names[0], "max_threads": 1}, BANNED: {"method": "vanilla"}}
    kept = Kept(out, Answered)
    with Engine.load(model_path, method=names, kv_tokens=KV_TOKENS) as engine:
        WarmUp(engine, model_path).wait()
        for dataset in asked:
            for place, question in enumerate(dataset.questions):
                _answer_all(engine, dataset.name, question, place, settings, new_tokens, kept)
    for dataset in asked:
        found = [kept.found[dataset.name, str(one.question_id), name] for one in dataset.questions for name in settings]
        for line in table(found, names):
            print(line)


def _answer_all(
    engine: Engine,
    dataset: str,
    question: Question,
    place: int,
    settings: dict[str, dict[str, Any]],
    new_tokens: int,
    kept: Kept[Answered],
) -> None:
    """All settings of a question, unless all are known; where they start changes with ``place``."""
    names = [*settings][place % len(settings) :] + [*settings][: place % len(settings)]
    if all((dataset, str(question.question_id), name) in kept.found for name in names):
        return
    for name in names:
        messages = [{"role": "user", "content": question.turns[0]}]
        started = perf_counter()
        events = list(engine.generate(messages, temperature=0, max_new_tokens=new_tokens, **settings[name]))
        seconds = perf_counter() - started
        summary = events[-1].summary
        assert summary is not None, "it comes with the last event"
        steps = [event.step for event in events if event.step]
        kept.add(
            Answered(
                dataset,
                question.category,
                str(question.question_id),
                name,
                seconds,
                summary.steps,
                summary.tokens,
                len({thread.thread for step in steps for thread in step.threads}),
                summary.kv_peak_tokens,
                events[-1].prompt_tokens,
                "".join(event.text for event in events),
            )
        )


def table(answers: Sequence[Answered], methods: Sequence[str]) -> Iterable[str]:
    """A line a category: how many fork; for each method tokens a step, over all and where it forks, and speeds.

    Speeds are times over those of one thread at a time, and tokens a second over vanilla's.
    """
    columns = " | ".join(f"{name} | where it forks | beside one thread | beside vanilla" for name in methods)
    yield f"| data set | category | questions | fork | {columns} | KV peak |"
    yield "|---|---|---:|---:|" + "---:|" * (4 * len(methods) + 1)
    for category in [*dict.fromkeys(answer.category for answer in answers), "**all**"]:
        mine = [answer for answer in answers if category in (answer.category, "**all**")]
        yield _line(category, mine, methods)


def _line(category: str, answers: Sequence[Answered], methods: Sequence[str]) -> str:
    by = {name: [answer for answer in answers if answer.setting == name] for name in (*methods, ONE_THREAD, BANNED)}
    first = by[methods[0]]
    forked = {answer.question for answer in first if answer.threads > 1}
    plain = _ratio(by[BANNED], lambda one: one.tokens, lambda one: one.seconds)
    cells = []
    for name in methods:
        threads = [answer for answer in by[name] if answer.question in forked]
        cells += [
            f"{_ratio(by[name], lambda one: one.tokens, lambda one: one.steps):.2f}",
            f"{_ratio(threads, lambda one: one.tokens, lambda one: one.steps):.2f}" if threads else "",
            f"{sum(one.seconds for one in by[ONE_THREAD]) / sum(one.seconds for one in by[name]):.2f}x",
            f"{_ratio(by[name], lambda one: one.tokens, lambda one: one.seconds) / plain:.2f}x",
        ]
    wide = [answer for answer in first if answer.question in forked]
    peak = f"{_ratio(wide, lambda one: one.kv_peak, lambda one: one.prompt_tokens + one.tokens):.0%}" if wide else ""
    share = f"{len(forked)} of {len(first)}"
    return f"| {first[0].dataset} | {category} | {len(first)} | {share} | {' | '.join(cells)} | {peak} |"


def _ratio(answers: Sequence[Answered], over: Callable[[Answered], float], under: Callable[[Answered], float]) -> float:
    """Of sums."""
    return sum(map(over, answers)) / sum(map(under, answers))


if __name__ == "__main__":
    typer.run(main)
