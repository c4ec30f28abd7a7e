"""Places of answers to learn from, and those held out to measure on."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from training.answers import Answer
from training.hidden import HiddenStates

HELD_OUT = 0.05  # of the answers, the last ones


@dataclass(frozen=True)
class Examples:
    """Places to learn from: of whole answers, one after another.

    Attributes:
        states: float16[N, h]; chosen: int64[N], the token that each of them chose.
        targets: int64[N, heads], the projection's row of each token ahead; -1 behind the answer's end, -2 for a token
            that the projection lacks.
    """

    states: np.ndarray
    chosen: torch.Tensor
    targets: torch.Tensor

    def batch(self, places: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """float32[B, h], int64[B] and int64[B, heads]."""
        states = torch.from_numpy(self.states[places].astype(np.float32))
        rows = torch.from_numpy(places)
        return states.to(device), self.chosen[rows].to(device), self.targets[rows].to(device)

    def teacher(self, places: np.ndarray, head: int, device: torch.device) -> torch.Tensor:
        """float32[B, h]: the states that chose what ``head`` is to guess, where there is a target."""
        rows = np.minimum(places + 1 + head, len(self.states) - 1)
        return torch.from_numpy(self.states[rows].astype(np.float32)).to(device)


def most_used(learned: Sequence[Answer], size: int, vocabulary: int) -> torch.Tensor:
    """int64[V'], ascending: the tokens that the model's answers hold most often, then those of the prompts."""
    counts = Counter(token for answer in learned for token in answer.answer)
    for answer in learned:
        counts.update(dict.fromkeys(answer.prompt, 0))
    tokens = [token for token, _ in counts.most_common(min(size, vocabulary))]
    return torch.tensor(sorted(tokens))


def examples_of(states: HiddenStates, token_ids: torch.Tensor | None, kept: np.ndarray) -> Examples:
    """The places where ``kept`` bool[N] is true, for heads over ``token_ids`` (None: all tokens)."""
    targets = torch.from_numpy(states.following[kept].astype(np.int64))
    if token_ids is not None:
        places = torch.full((int(max(targets.max(), token_ids.max())) + 2,), -2)  # no row: never right
        places[token_ids] = torch.arange(len(token_ids))
        places[-1] = -1  # behind the answer's end: not counted
        targets = places[targets]
    return Examples(states.states[kept], torch.from_numpy(states.chosen[kept].astype(np.int64)), targets)


def held_out(states: HiddenStates, token_ids: torch.Tensor | None) -> Examples:
    """Places that were not trained on."""
    return examples_of(states, token_ids, kept=is_held_out(states))


def is_held_out(states: HiddenStates) -> np.ndarray:
    """bool[N]: places of the last answers."""
    first: np.ndarray = states.answer >= int((1 - HELD_OUT) * (1 + states.answer.max()))
    return first
