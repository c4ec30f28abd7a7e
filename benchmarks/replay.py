"""``python -m benchmarks.replay``: a method's tokens per step on known answers, without decoding them again.

Greedy decoding is exact, so the answer says what the model chooses wherever a draft is right, and the tokens per step
follow. For methods that draft from the text alone (n-gram, lookahead without its window) nothing is left to compute.
With ``--check`` some answers are decoded for real and must take the same steps.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.opening import answered
from benchmarks.recorded import Recorded, Records, records_of
from benchmarks.settings import Setting, decode
from benchmarks.table import table
from protocol.generation import DraftSettings
from training.answers import Answer
from workers.decoding.interface import Budget, Method
from workers.decoding.registry import check_method, make_method
from workers.engine import Engine
from workers.model.sampling import Sampling
from workers.model.tree import TokenTree
from workers.model.verification import ROOT, path_tokens, walk

ROWS = 256


@dataclass
class ReplayedThread:
    """A thread on a known path, as a method sees it."""

    token_ids: list[int]
    prompt_length: int
    remaining: int
    draft: DraftSettings
    path: tuple[int, ...] = ()
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0))
    state: dict[str, Any] = field(default_factory=dict)


class KnownChoices(Mapping[int, int]):
    """What the model chooses at the nodes of a tree, as far as a known continuation tells; elsewhere no token."""

    def __init__(self, tree: TokenTree, continuation: list[int]) -> None:
        self._tree = tree
        self._continuation = continuation

    def __getitem__(self, node: int) -> int:
        path = path_tokens(self._tree, node) if node != ROOT else []
        known = self._continuation
        return known[len(path)] if len(path) < len(known) and known[: len(path)] == path else -1

    def __iter__(self) -> Iterator[int]:
        return iter(range(ROOT, len(self._tree)))

    def __len__(self) -> int:
        return 1 + len(self._tree)


def replay(method: Method, answer: Answer, draft: DraftSettings, recorded: Recorded | None = None) -> list[int]:
    """Tokens emitted in every step; ``recorded`` for methods that learn from what the model returned."""
    thread = ReplayedThread(list(answer.prompt), len(answer.prompt), answer.new_tokens, draft)
    emitted: list[int] = []
    done = 0
    while done < len(answer.answer):
        continuation = answer.answer[done:]
        tree = method.draft([thread], Budget(ROWS))[0]
        taken = walk(tree, KnownChoices(tree, continuation), limit=len(continuation), terminal=())
        count = len(taken.token_ids)
        emitted.append(count)
        thread.token_ids += taken.token_ids
        thread.remaining -= count
        done += count
        if recorded is not None and done < len(answer.answer):
            method.observe([thread], [recorded.outcome(tree, taken, done - 1)])
    return emitted


def main(
    settings: Annotated[list[str], typer.Argument(metavar="METHOD[:SIZES]...")],
    datasets: Annotated[str, typer.Option(help="names or JSONL files, separated by commas")] = "vicuna_bench,mt_bench",
    per_category: Annotated[int | None, typer.Option(min=1, help="questions; by default all")] = None,
    model_path: str = "smollm2-135m",
    new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    answers: Annotated[Path, typer.Option(help="where the model's answers are kept")] = Path("runs/answers.jsonl"),
    check: Annotated[int, typer.Option(min=0, help="answers to decode for real as well")] = 4,
) -> None:
    """Print tokens per step by data set and category: ratios of sums."""
    wanted = [Setting.parse(text) for text in settings]
    with answered(wanted, datasets, per_category, model_path, new_tokens, answers) as (engine, turns):
        records = records_of(engine, [turn.answer for turn in turns], answers.parent)
        steps = [[replayed(engine, one, turn.answer, records) for turn in turns] for one in wanted]
        for line in table(turns, dict(zip(settings, steps, strict=True))):
            print(line)
        for place in range(0, len(turns), max(1, len(turns) // check)) if check else []:
            for setting, taken in zip(wanted, steps, strict=True):
                decoded = list(map(len, decode(engine, setting, turns[place])))
                same = "as replayed" if decoded == taken[place] else f"replayed: {len(taken[place])}"
                print(f"{setting.name}: decoded turn {place} in {len(decoded)} steps, {same}")


def replayed(engine: Engine, setting: Setting, answer: Answer, records: Records) -> list[int]:
    """Tokens emitted in every step of a setting."""
    method = make_method(setting.method, engine.adapters)
    return replay(method, answer, setting.draft, records.get((check_method(setting.method), answer.key)))


if __name__ == "__main__":
    typer.run(main)
