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

from benchmarks.answers import Answer, Key, vanilla_answers
from protocol.generation import DraftSettings
from traces.datasets import load_datasets
from workers.decoding.interface import Budget, Method
from workers.decoding.registry import make_method
from workers.engine import Engine
from workers.model.sampling import Sampling
from workers.model.tree import TokenTree
from workers.model.verification import ROOT, path_tokens, walk
from workers.warm_up import WarmUp

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


def replay(method: Method, answer: Answer, draft: DraftSettings, *, new_tokens: int) -> list[int]:
    """Tokens emitted in every step."""
    thread = ReplayedThread(list(answer.prompt), len(answer.prompt), new_tokens, draft)
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
    method: str = "ngram",
    datasets: Annotated[str, typer.Option(help="names or JSONL files, separated by commas")] = "vicuna_bench,mt_bench",
    nodes: Annotated[int | None, typer.Option(min=1, help="candidate rows a step")] = 7,
    model_path: str = "smollm2-135m",
    new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    answers: Annotated[Path, typer.Option(help="where the model's answers are kept")] = Path("runs/answers.jsonl"),
    check: Annotated[int, typer.Option(min=0, help="answers to decode for real as well")] = 4,
) -> None:
    """Print tokens per step by data set and category: ratios of sums."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    draft = DraftSettings(nodes=nodes)
    with Engine.load(model_path, method=[method], kv_tokens=16384, tune=False) as engine:
        WarmUp(engine, model_path, measure=False).wait()
        known = vanilla_answers(engine, load_datasets(datasets.split(",")), new_tokens, answers)
        steps = {answer.key: replay(make_method(method), answer, draft, new_tokens=new_tokens) for answer in known}
        report(known, steps)
        for answer in known[:: max(1, len(known) // check)][:check] if check else []:
            options = {"draft": draft.model_dump(), "temperature": 0, "max_new_tokens": new_tokens}
            events = engine.generate(answer.messages, method=method, **options)
            decoded = [len(event.step.threads[0].token_ids) for event in events if event.step]
            same = "the same steps" if decoded == steps[answer.key] else f"{len(decoded)} steps"
            print(f"decoded {answer.key}: {same}, replayed {len(steps[answer.key])}")


def report(known: list[Answer], steps: dict[Key, list[int]]) -> None:
    """The table."""
    groups: dict[tuple[str, str], list[list[int]]] = {}
    for answer in known:
        for group in ((answer.dataset, answer.category), (answer.dataset, "all")):
            groups.setdefault(group, []).append(steps[answer.key])
    for (dataset, category), replayed in sorted(groups.items()):
        tokens, count = sum(map(sum, replayed)), sum(map(len, replayed))
        print(f"{dataset:16} {category:20} {len(replayed):4} answers {tokens:7} tokens {tokens / count:6.2f} per step")


if __name__ == "__main__":
    typer.run(main)
