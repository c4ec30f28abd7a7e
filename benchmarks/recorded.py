"""What the model returned while it gave known answers, as far as methods learn from it: for replays."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from training.answers import Answer, Key
from training.foreseen import ForeseenGuesses, foreseen_guesses
from training.hidden import hidden_states
from workers.decoding.interface import Outcome
from workers.decoding.ppd import chains_of
from workers.decoding.prompt_tokens import PromptTokens
from workers.engine import Engine
from workers.model.runner import ModelRunner
from workers.model.tree import TokenTree
from workers.model.verification import ROOT, Walk


class Recorded(Protocol):
    """An answer's record."""

    def outcome(self, tree: TokenTree, taken: Walk, place: int) -> Outcome:
        """What a method hears of a step whose last token is number ``place`` of the answer."""


Records = Mapping[tuple[str, Key], Recorded]  # kind of adapter, answer


@dataclass(frozen=True)
class RecordedStates:
    """float[n, hidden], the states from which the answer's tokens were chosen."""

    states: np.ndarray

    def outcome(self, tree: TokenTree, taken: Walk, place: int) -> Outcome:
        hidden = torch.zeros(1 + len(tree), self.states.shape[1])
        last = taken.rows[-1] if taken.rows else ROOT
        hidden[1 + last] = torch.from_numpy(self.states[place].astype(np.float32))
        return _outcome(tree, taken, torch.zeros(1 + len(tree), 0), hidden)


@dataclass(frozen=True)
class RecordedGuesses:
    """What prompt tokens said; ``virtual`` rows of each special token say the same."""

    guesses: ForeseenGuesses
    vocabulary: int
    virtual: int

    def outcome(self, tree: TokenTree, taken: Walk, place: int) -> Outcome:
        logits = torch.zeros(1 + len(tree), self.vocabulary)
        tokens = torch.from_numpy(self.guesses.tokens[place])
        chances = torch.from_numpy(self.guesses.chances[place])
        others = (1 - chances.sum(1)).clamp(min=1e-9) / self.vocabulary
        for number, row in enumerate(chains_of(tree).get(taken.rows[-1] if taken.rows else ROOT, [])):
            special = number // self.virtual
            logits[1 + row] = others[special].log()
            logits[1 + row, tokens[special]] = chances[special].log()
        return _outcome(tree, taken, logits, None)


def _outcome(tree: TokenTree, taken: Walk, logits: torch.Tensor, hidden: torch.Tensor | None) -> Outcome:
    every = range(1 + len(tree))
    return Outcome(tree, taken.rows, taken.token_ids, logits, hidden, every, every)


def records_of(engine: Engine, known: list[Answer], folder: Path) -> Records:
    """Records for the engine's adapters: a forward pass or two an answer, kept in ``folder``."""
    records: dict[tuple[str, Key], Recorded] = {}
    for kind, adapter in engine.adapters.items():
        recorded = engine.between_steps(partial(_RECORDERS[kind], adapter, known, folder)).result()
        records |= {(kind, answer.key): record for answer, record in zip(known, recorded, strict=True)}
    return records


def _record_states(adapter: Any, known: list[Answer], folder: Path, runner: ModelRunner) -> list[Recorded]:
    found = hidden_states(runner.model, known, 0, folder)
    ends = np.cumsum([len(answer.answer) for answer in known])
    return [RecordedStates(part) for part in np.split(found.states, ends[:-1])]


def _record_guesses(adapter: PromptTokens, known: list[Answer], folder: Path, runner: ModelRunner) -> list[Recorded]:
    found = foreseen_guesses(runner.model, adapter, known, folder)
    return [RecordedGuesses(guesses, runner.vocabulary, adapter.virtual) for guesses in found]


_RECORDERS: dict[str, Callable[[Any, list[Answer], Path, ModelRunner], list[Recorded]]] = {
    "medusa": _record_states,
    "ppd": _record_guesses,
}
