"""``python -m benchmarks.methods``: methods decoded for real on whole benchmarks: vanilla's answers, in how many steps?

Every answer is compared with vanilla's, token for token. Greedy ones may differ at a tie: where both tokens' logits lie
within TIE of each other, a batch of another shape may swap them. In other types than float32 ties are everywhere, and
answers are not compared: ``--dtype bfloat16`` counts the steps of settings with many rows, several times as fast on a
CPU with tiles. Finished turns are kept in a file and not decoded again.
"""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.answers import Turn
from benchmarks.opening import answered
from benchmarks.settings import Setting, decode
from benchmarks.table import table
from benchmarks.verify import MOST_TIES, TIE, logit_gap
from training.kept import Kept
from workers.engine import Engine

SKIPPED = "not compared"
SAMPLED = {"temperature": 0.7, "top_p": 0.95, "seed": 7}


@dataclass(frozen=True)
class Result:
    """One turn decoded with one setting: tokens of every step, and how the answer compares with vanilla's."""

    model: str
    setting: str
    sampled: bool
    new_tokens: int
    prompt: list[int]
    steps: list[int]
    verdict: str  # equal, tie, different, not compared

    @property
    def key(self) -> tuple[str, str, bool, int, tuple[int, ...]]:
        return self.model, self.setting, self.sampled, self.new_tokens, tuple(self.prompt)


class Results:
    """A JSONL file of results; each is appended when it is there."""

    def __init__(self, path: Path) -> None:
        self._kept = Kept(path, Result)

    def of(self, engine: Engine, setting: Setting, turn: Turn, *, sampled: bool) -> Result:
        """The result of a turn, decoded now unless it is known."""
        answer = turn.answer
        exact = engine.dtype == "float32"
        model = engine.name if exact else f"{engine.name} in {engine.dtype}"
        known = self._kept.found.get((model, setting.name, sampled, answer.new_tokens, tuple(answer.prompt)))
        if known:
            return known
        steps = decode(engine, setting, turn, **(SAMPLED if sampled else {}))
        plain = decode(engine, Setting.parse("vanilla"), turn, **SAMPLED) if sampled and exact else [answer.answer]
        ours = list(chain(*steps))
        result = Result(
            model=model,
            setting=setting.name,
            sampled=sampled,
            new_tokens=answer.new_tokens,
            prompt=answer.prompt,
            steps=list(map(len, steps)),
            verdict=verdict(engine, answer.prompt, ours, list(chain(*plain)), sampled=sampled) if exact else SKIPPED,
        )
        self._kept.add(result)
        return result


def verdict(engine: Engine, prompt: list[int], ours: list[int], plain: list[int], *, sampled: bool) -> str:
    """``equal``, ``tie`` or ``different``. A sampled answer has no ties: it differs after one."""
    if ours == plain:
        return "equal"
    pairs = enumerate(zip(ours, plain, strict=False))
    first = next((place for place, (a, b) in pairs if a != b), None)
    if first is None or sampled:
        return "different"
    gap = partial(logit_gap, prompt + plain[:first], ours[first], plain[first])
    return "tie" if engine.between_steps(gap).result() <= TIE else "different"


def main(
    settings: Annotated[list[str], typer.Argument(metavar="METHOD[:SIZES]...")],
    datasets: Annotated[str, typer.Option(help="names or JSONL files, separated by commas")] = "vicuna_bench,mt_bench",
    per_category: Annotated[int | None, typer.Option(min=1, help="questions; by default all")] = None,
    sampled: Annotated[bool, typer.Option("--sampled", help=f"with {SAMPLED} instead of greedy")] = False,
    together: Annotated[int, typer.Option(min=1, help="turns decoded at a time; a step holds 512 rows")] = 8,
    model_path: str = "smollm2-135m",
    dtype: Annotated[str | None, typer.Option(help="of the decoding engine [default: by device]")] = None,
    new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    answers: Annotated[Path, typer.Option(help="where the model's answers are kept")] = Path("runs/answers.jsonl"),
    out: Annotated[Path, typer.Option(help="where results are kept")] = Path("runs/methods.jsonl"),
) -> None:
    """Decode what is missing, print tokens per step; exit 1 if an answer is wrong or more than 2 % differ by ties."""
    wanted = [Setting.parse(text) for text in settings]
    with answered(wanted, datasets, per_category, model_path, new_tokens, answers, dtype=dtype) as (engine, turns):
        results = Results(out)
        columns: dict[str, list[Result]] = {}
        with ThreadPoolExecutor(together) as pool:
            for setting in wanted:
                work = partial(results.of, engine, setting, sampled=sampled)
                columns[setting.name] = list(pool.map(work, turns))
                print(summary(setting.name, columns[setting.name]), flush=True)
        for line in table(turns, {name: [one.steps for one in column] for name, column in columns.items()}):
            print(line)
    sys.exit(0 if all(map(passed, columns.values())) else 1)


def summary(name: str, results: Sequence[Result]) -> str:
    """One line."""
    verdicts = [result.verdict for result in results]
    kinds = [SKIPPED] if SKIPPED in verdicts else ["equal", "tie", "different"]
    return f"{name}: " + ", ".join(f"{verdicts.count(one)} {one}" for one in kinds)


def passed(results: Sequence[Result]) -> bool:
    """No answer is wrong, and few differ by ties."""
    verdicts = [result.verdict for result in results]
    return "different" not in verdicts and verdicts.count("tie") <= MOST_TIES * len(verdicts)


if __name__ == "__main__":
    typer.run(main)
