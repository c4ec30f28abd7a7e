"""How a step's rows are best split between candidates, which may be accepted now, and prompt rows, which guess ahead.

PPD's trees are built in advance for average accuracies (:mod:`workers.decoding.tree_builder`). Here the same objective
is followed in every step, with what the prompt tokens say this time: a candidate is worth its probability, the i-th
prompt row behind a node is worth the probability that acceptance ends at this node, times the tokens that guesses of
depth i have brought lately.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from workers.decoding.sparse_tree import RankPath
from workers.model.verification import ROOT

COUNTS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48)  # of candidates that are tried


@dataclass(frozen=True)
class Plan:
    """The best splits of every number of rows.

    Attributes:
        values: float[most + 1], tokens that so many rows bring, in this step and, by their guesses, in the next one.
        candidates: int[most + 1], how many of them are candidates.
    """

    values: np.ndarray
    candidates: np.ndarray
    _ends: dict[int, np.ndarray]
    _gains: np.ndarray
    _cost: int

    def chains(self, rows: int) -> list[int]:
        """Prompt tokens behind the root and behind each candidate, if so many rows are spent."""
        count = int(self.candidates[rows])
        prompts = (rows - count) // self._cost
        worth = np.outer(self._ends[count], self._gains)
        chosen = np.argsort(-worth, axis=None, kind="stable")[:prompts]
        return np.bincount(chosen // len(self._gains), minlength=count + 1).tolist()


def plan_rows(nodes: Sequence[tuple[RankPath, float]], gains: Sequence[float], most: int, cost: int = 1) -> Plan:
    """Splits of up to ``most`` rows.

    Args:
        nodes: candidates and their probabilities, from the most probable one on.
        gains: tokens that the i-th prompt token of a chain brings to the next step.
        cost: rows of a prompt token (v).
    """
    falling = np.minimum.accumulate(np.asarray(gains, dtype=float))  # the chain has no holes
    values, candidates = np.zeros(most + 1), np.zeros(most + 1, dtype=int)
    ends: dict[int, np.ndarray] = {}
    places = {path: place for place, (path, _) in enumerate(nodes)}
    parents = [places.get(path[:-1], ROOT) for path, _ in nodes]
    chances = [chance for _, chance in nodes]
    for count in COUNTS:
        if count > min(len(nodes), most):
            break
        ends[count] = end_chances(parents[:count], chances[:count])
        prompts = -np.sort(-np.outer(ends[count], falling), axis=None)[: (most - count) // cost]
        totals = sum(chances[:count]) + np.concatenate([[0.0], np.cumsum(prompts)])
        rows = count + cost * np.arange(len(totals))
        better = rows[totals > values[rows]]
        values[better] = totals[(better - count) // cost]
        candidates[better] = count
    return Plan(values, candidates, ends, falling, cost)


def end_chances(parents: Sequence[int], chances: Sequence[float]) -> np.ndarray:
    """float[1 + n]: how probable it is that acceptance ends at the root, and at each of n nodes.

    Args:
        parents: the nodes' parents by number, or ROOT.
        chances: probabilities that acceptance reaches them.
    """
    ends = np.array([1.0, *chances])
    np.subtract.at(ends, np.asarray(parents, dtype=int) - ROOT, np.asarray(chances, dtype=float))
    return np.maximum(ends, 0.0)
