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
from transformers.utils import logging as transformers_logging

from benchmarks.answers import vanilla_answers
from benchmarks.settings import Setting, decode
from benchmarks.table import table
from protocol.generation import DraftSettings
from traces.datasets import load_datasets
from training.answers import TOGETHER, Answer
from workers.decoding.interface import Budget, Method
from workers.decoding.registry import make_method
from workers.engine import Engine
from workers.model.sampling import Sampling
from workers.model.tree import TokenTree
from workers.model.verification import ROOT, path_tokens, walk
from workers.warm_up import WarmUp

ROWS = 256
KV_TOKENS = 65536


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


def replay(method: Method, answer: Answer, draft: DraftSettings) -> list[int]:
    """Tokens emitted in every step."""
    thread = ReplayedThread(list(answer.prompt), len(answer.prompt), answer.new_tokens, draft)
    emitted: list[int] = []
    done = 0
    while done < len(answer.answer):
        continuation = answer.answer[done:]
        tree = method.draft([thread], Budget(ROWS))[0]
        taken = walk(tree, KnownChoices(tree, continuation), limit=len(continuation), terminal=()).token_ids
        emitted.append(len(taken))
        thread.token_ids += taken
        thread.remaining -= len(taken)
        done += len(taken)
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
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    wanted = [Setting.parse(text) for text in settings]
    asked = [dataset.sample(per_category) for dataset in load_datasets(datasets.split(","))]
    methods = [setting.method for setting in wanted]
    with Engine.load(model_path, method=methods, kv_tokens=KV_TOKENS, max_requests=TOGETHER, tune=False) as engine:
        WarmUp(engine, model_path, measure=False).wait()
        turns = vanilla_answers(engine, asked, new_tokens, answers)
        steps = [[replay(make_method(one.method), turn.answer, one.draft) for turn in turns] for one in wanted]
        for line in table(turns, {name: list(map(len, taken)) for name, taken in zip(settings, steps, strict=True)}):
            print(line)
        for place in range(0, len(turns), max(1, len(turns) // check)) if check else []:
            for setting, replayed in zip(wanted, steps, strict=True):
                decoded = list(map(len, decode(engine, setting, turns[place])))
                same = "as replayed" if decoded == replayed[place] else f"replayed: {len(replayed[place])}"
                print(f"{setting.name}: decoded turn {place} in {len(decoded)} steps, {same}")


if __name__ == "__main__":
    typer.run(main)
