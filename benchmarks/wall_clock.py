"""``python -m benchmarks.wall_clock``: methods beside vanilla on the clock, one request at a time, alternating.

The tuner is on unless a setting fixes its sizes. A machine's speed drifts by more than methods differ, so every turn is
decoded by vanilla and by each setting right after each other, in changing order, and ratios of sums are reported.
"""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer

from benchmarks.answers import Turn
from benchmarks.opening import answered
from benchmarks.settings import Setting, decode
from workers.engine import Engine


def main(
    settings: Annotated[list[str], typer.Argument(metavar="METHOD[:SIZES]...")],
    datasets: Annotated[str, typer.Option(help="names or JSONL files, separated by commas")] = "vicuna_bench,mt_bench",
    per_category: Annotated[int, typer.Option(min=1, help="questions")] = 3,
    model_path: str = "smollm2-135m",
    new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    answers: Annotated[Path, typer.Option(help="where the model's answers are kept")] = Path("runs/answers.jsonl"),
) -> None:
    """Print the speed over vanilla's and tokens per step, by data set and category."""
    wanted = [Setting.parse("vanilla"), *map(Setting.parse, settings)]
    with answered(wanted, datasets, per_category, model_path, new_tokens, answers, tune=True) as (engine, turns):
        print(engine.curve, flush=True)
        print("| data set | category | turns | " + " | ".join(f"{one.name} | steps" for one in wanted[1:]) + " |")
        print("|---|---|---:|" + "---:|---:|" * len(settings))
        groups: dict[tuple[str, str], list[Turn]] = {}
        for turn in turns:
            groups.setdefault((turn.dataset, turn.category), []).append(turn)
        times: dict[str, list[list[tuple[float, int]]]] = {}
        for (dataset, category), members in groups.items():
            measured = [timed(engine, wanted, turn, place) for place, turn in enumerate(members)]
            times.setdefault(dataset, []).extend(measured)
            print(line(dataset, category, measured), flush=True)
        for dataset, measured in times.items():
            print(line(dataset, "**all**", measured), flush=True)


def timed(engine: Engine, settings: Sequence[Setting], turn: Turn, place: int) -> list[tuple[float, int]]:
    """Seconds and steps of every setting for one turn; where they start changes with ``place``."""
    measured: dict[int, tuple[float, int]] = {}
    for offset in range(len(settings)):
        number = (place + offset) % len(settings)
        started = perf_counter()
        steps = decode(engine, settings[number], turn)
        measured[number] = (perf_counter() - started, len(steps))
    return [measured[number] for number in range(len(settings))]


def line(dataset: str, category: str, measured: Sequence[Sequence[tuple[float, int]]]) -> str:
    """Speed over the first setting's, and steps saved, of the others."""
    totals = [
        (sum(seconds for seconds, _ in column), sum(steps for _, steps in column))
        for column in zip(*measured, strict=True)
    ]
    (plain_s, plain_steps), *others = totals
    shown = " | ".join(f"{plain_s / seconds:.2f}x | {plain_steps / steps:.2f}" for seconds, steps in others)
    return f"| {dataset} | {category} | {len(measured)} | {shown} |"


if __name__ == "__main__":
    typer.run(main)
