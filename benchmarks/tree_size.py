"""``python -m benchmarks.tree_size``: how large a draft should be here: tokens a step by its rows, a step's time, both.

PPD's measure of a tree of n rows is tau(n) / (L(n) / L(1)): its tokens per step, which a replay tells, over what a
forward pass of its rows costs beside one of a single row, by the latency curve. The tuner follows it in every step.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer

from benchmarks.opening import answered
from benchmarks.recorded import records_of
from benchmarks.replay import replayed
from benchmarks.settings import Setting
from training.pictures import lines_picture


def main(
    methods: Annotated[list[str], typer.Argument(metavar="METHOD...")],
    sizes: Annotated[str, typer.Option(help="rows of a draft, separated by commas")] = "4,8,12,16,24,32,48,64",
    datasets: Annotated[str, typer.Option(help="names or JSONL files, separated by commas")] = "mt_bench",
    per_category: Annotated[int | None, typer.Option(min=1, help="questions; by default all")] = 2,
    model_path: str = "smollm2-135m",
    new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    answers: Annotated[Path, typer.Option(help="where the model's answers are kept")] = Path("runs/answers.jsonl"),
    out: Annotated[Path, typer.Option(help="picture")] = Path("runs/tree_size.png"),
) -> None:
    """Print a line a size and draw the expected speeds."""
    widths = [int(size) for size in sizes.split(",")]
    wanted = [Setting.parse(method) for method in methods]
    with answered(wanted, datasets, per_category, model_path, new_tokens, answers, tune=True) as (engine, turns):
        records = records_of(engine, [turn.answer for turn in turns], answers.parent)
        context = fmean(len(turn.answer.prompt) + len(turn.answer.answer) / 2 for turn in turns)
        assert engine.curve is not None, "the warm-up measured it"
        costs = [engine.curve.at(1 + size, context) / engine.curve.at(1, context) for size in widths]
        print(engine.curve)
        print(f"{len(turns)} turns, mean context {context:.0f}")
        print("| rows | time | " + " | ".join(f"{name}: tokens a step | speed" for name in methods) + " |")
        print("|---:|---:|" + "---:|---:|" * len(methods))
        taus: list[list[float]] = []
        for size, cost in zip(widths, costs, strict=True):
            settings = [Setting.parse(f"{name}:nodes={size}") for name in methods]
            steps = [sum(len(replayed(engine, one, turn.answer, records)) for turn in turns) for one in settings]
            taus.append([sum(len(turn.answer.answer) for turn in turns) / count for count in steps])
            print(f"| {size} | {cost:.2f} | " + " | ".join(f"{tau:.2f} | {tau / cost:.2f}x" for tau in taus[-1]) + " |")
        draw(widths, dict(zip(methods, zip(*taus, strict=True), strict=True)), costs, out)


def draw(widths: Sequence[int], tokens: Mapping[str, Sequence[float]], costs: Sequence[float], out: Path) -> None:
    """Tokens a step, a step's time, and their quotient in one picture."""
    named = {f"{name}: tokens a step": list(taus) for name, taus in tokens.items()}
    for name, taus in tokens.items():
        named[f"{name}: speed over vanilla's"] = [tau / cost for tau, cost in zip(taus, costs, strict=True)]
    out.parent.mkdir(parents=True, exist_ok=True)
    lines_picture(widths, {**named, "time of a step": list(costs)}, "rows of a draft", out)


if __name__ == "__main__":
    typer.run(main)
