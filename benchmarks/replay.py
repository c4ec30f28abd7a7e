"""``python -m benchmarks.replay``: a method's tokens per step on known answers, without decoding them again.

Greedy decoding is exact, so the answer says what the model chooses wherever a draft is right, and the tokens per step
follow. For methods that draft from the text alone (n-gram, lookahead without its window) nothing is left to compute.
With ``--check`` some answers are decoded for real and must take the same steps.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.opening import answered
from benchmarks.settings import Setting, decode
from benchmarks.table import table
from protocol.generation import DraftSettings
from training.answers import Answer, Key
from training.hidden import hidden_states
from workers.decoding.interface import Budget, Method, Outcome
from workers.decoding.registry import make_method
from workers.engine import Engine
from workers.model.sampling import Sampling
from workers.model.tree import Needs, TokenTree
from workers.model.verification import ROOT, Walk, path_tokens, walk

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


def replay(method: Method, answer: Answer, draft: DraftSettings, states: np.ndarray | None = None) -> list[int]:
    """Tokens emitted in every step.

    Args:
        states: float[n, hidden] from which the answer's tokens were chosen, for methods that ask for hidden states.
    """
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
        if states is not None and done < len(answer.answer):
            method.observe([thread], [_outcome(tree, taken, states[done - 1])])
    return emitted


def _outcome(tree: TokenTree, taken: Walk, state: np.ndarray) -> Outcome:
    """What a method hears of a step: of the hidden states, that of the row that chose the last token."""
    hidden = torch.zeros(1 + len(tree), len(state))
    hidden[1 + taken.rows[-1] if taken.rows else 0] = torch.from_numpy(state.astype(np.float32))
    nothing = torch.zeros(1 + len(tree), 0)
    return Outcome(tree, taken.rows, taken.token_ids, nothing, hidden, range(len(nothing)), range(len(hidden)))


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
        states = states_of(engine, [turn.answer for turn in turns], answers.parent) if engine.adapters else {}
        steps = [[replayed(engine, one, turn.answer, states) for turn in turns] for one in wanted]
        for line in table(turns, {name: list(map(len, taken)) for name, taken in zip(settings, steps, strict=True)}):
            print(line)
        for place in range(0, len(turns), max(1, len(turns) // check)) if check else []:
            for setting, taken in zip(wanted, steps, strict=True):
                decoded = list(map(len, decode(engine, setting, turns[place])))
                same = "as replayed" if decoded == taken[place] else f"replayed: {len(taken[place])}"
                print(f"{setting.name}: decoded turn {place} in {len(decoded)} steps, {same}")


def states_of(engine: Engine, known: list[Answer], folder: Path) -> dict[Key, np.ndarray]:
    """The hidden states from which each answer was chosen: one forward pass an answer, kept in ``folder``."""
    found = engine.between_steps(lambda runner: hidden_states(runner.model, known, 0, folder)).result()
    ends = np.cumsum([len(answer.answer) for answer in known])
    return {answer.key: part for answer, part in zip(known, np.split(found.states, ends[:-1]), strict=True)}


def replayed(engine: Engine, setting: Setting, answer: Answer, states: Mapping[Key, np.ndarray]) -> list[int]:
    """Tokens emitted in every step of a setting."""
    method = make_method(setting.method, engine.adapters)
    wants_states = bool(method.root_needs & Needs.HIDDEN)
    return replay(method, answer, setting.draft, states[answer.key] if wants_states else None)


if __name__ == "__main__":
    typer.run(main)
