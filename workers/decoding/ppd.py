"""PPD: prompt tokens behind the last token and behind candidates guess what the next step drafts (Chen et al. 2024).

The prompt rows' keys and values are never kept. The guesses of the node at which acceptance ends are the next step's
candidates; how many there are is the *state* of that step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from itertools import islice
from math import prod
from pathlib import Path

import numpy as np
import torch

from workers.decoding.dynamic_tree import DynamicTree, read_dynamic_trees
from workers.decoding.heads import best_guesses
from workers.decoding.interface import Budget, DraftThread, Method, Outcome
from workers.decoding.prompt_plan import COUNTS, plan_rows
from workers.decoding.prompt_tokens import PromptTokens
from workers.decoding.sparse_tree import RankPath, best_paths
from workers.model.tree import EMPTY_TREE, Needs, TokenTree
from workers.model.verification import ROOT

WIDTH = 10  # guesses of a prompt token, as published
MOST_ROWS = 64  # without a wish
SIZES = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)  # from which the tuner chooses
FIRST_GAIN, NEXT_GAIN = 0.6, 0.4  # tokens that guesses of depth 1 bring, and of each further depth, until it is known
RECENT = 0.1  # what a step weighs in that
STATE = "ppd"

Nodes = Sequence[tuple[RankPath, float]]


@dataclass
class Foreseen:
    """What a thread knows of its future.

    Attributes:
        tokens, chances: [state][WIDTH], guesses of each depth and their probabilities.
        gains: [S], tokens a step that guesses of each depth have brought lately, by their own estimate.
    """

    gains: list[float]
    tokens: list[list[int]] = field(default_factory=list)
    chances: list[list[float]] = field(default_factory=list)

    def learn(self, nodes: Nodes) -> None:
        """Take in what a step drafts."""
        for depth in range(len(self.chances)):
            drafted = sum(chance for path, chance in nodes if len(path) == depth + 1)
            self.gains[depth] += RECENT * (drafted - self.gains[depth])


class Ppd(Method):
    """Drafts the candidates and prompt rows that are worth most by what the prompt tokens said, or a tree by name."""

    name = "ppd"

    def __init__(self, tokens: PromptTokens) -> None:
        self._tokens = tokens
        self._rows = tokens.embeddings.flatten(0, 1)
        self._trees = {**published_trees(), **tokens.trees}
        self.trees = self._trees.keys()

    def draft(self, threads: Sequence[DraftThread], budget: Budget) -> list[TokenTree]:
        return [self._tree(thread, budget) for thread in threads]

    def observe(self, threads: Sequence[DraftThread], outcomes: Sequence[Outcome]) -> None:
        logits: list[torch.Tensor] = []
        for outcome in outcomes:
            chain = chain_rows(outcome.tree, outcome.rows[-1] if outcome.rows else ROOT)
            if chain:
                rows = outcome.logits[1 + chain[0] : 2 + chain[-1]].float()
                logits.append(rows.unflatten(0, (-1, self._tokens.virtual)).mean(1))
            else:
                logits.append(outcome.logits[:0].float())
        tokens, chances = best_guesses(torch.cat(logits)[:, None], None, WIDTH)
        found = zip(tokens[0], chances[0], strict=True) if tokens else iter(())
        for thread, own in zip(threads, logits, strict=True):
            foreseen = self._foreseen(thread)
            pairs = list(islice(found, len(own)))
            foreseen.tokens, foreseen.chances = [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    def _foreseen(self, thread: DraftThread) -> Foreseen:
        blank = Foreseen([FIRST_GAIN * NEXT_GAIN**depth for depth in range(len(self._tokens))])
        foreseen: Foreseen = thread.state.setdefault(STATE, blank)
        return foreseen

    def _tree(self, thread: DraftThread, budget: Budget) -> TokenTree:
        foreseen = self._foreseen(thread)
        chances = foreseen.chances[: thread.remaining - 1]
        nodes, chains = self._named(thread, chances) or self._planned(thread, foreseen, chances, budget)
        if len(nodes) + self._tokens.virtual * sum(chains) > budget.rows:
            return EMPTY_TREE
        candidates = [
            (tuple(foreseen.tokens[depth][rank] for depth, rank in enumerate(path)), chance) for path, chance in nodes
        ]
        return self._grown(candidates, chains)

    def _named(self, thread: DraftThread, chances: list[list[float]]) -> tuple[Nodes, list[int]] | None:
        """The nodes and chains of the tree that the request names."""
        if not thread.draft.tree:
            return None
        tree = self._trees[thread.draft.tree]
        special = len(self._tokens)
        state = min(len(chances), tree.special)
        drawn = [node for node in tree.states[state - 1] if max(node.path) < WIDTH] if state else []
        nodes = [(node.path, prod(chances[depth][rank] for depth, rank in enumerate(node.path))) for node in drawn]
        return nodes, [special, *(min(node.prompts, special) for node in drawn)]

    def _planned(
        self, thread: DraftThread, foreseen: Foreseen, chances: list[list[float]], budget: Budget
    ) -> tuple[Nodes, list[int]]:
        most = min(thread.draft.nodes or MOST_ROWS, budget.rows)
        nodes = list(islice(best_paths(chances), min(COUNTS[-1], most)))
        plan = plan_rows(nodes, foreseen.gains, most, self._tokens.virtual)
        rows: int | None = most
        if not thread.draft.nodes:
            sizes = [size for size in SIZES if size <= most]
            chosen = budget.best([(size, float(plan.values[size])) for size in sizes], len(sizes) - 1, thread)
            rows = None if chosen is None else sizes[chosen]
        if rows is None:
            return [], [0]
        drafted = nodes[: plan.candidates[rows]]
        foreseen.learn(drafted)
        return drafted, plan.chains(rows)

    def _grown(self, candidates: Sequence[tuple[tuple[int, ...], float]], chains: Sequence[int]) -> TokenTree:
        """Candidates, parents first, and behind them the chains of the root and of each candidate."""
        rows = {path: row for row, (path, _) in enumerate(candidates)}
        token_ids = [path[-1] for path, _ in candidates]
        parents = [rows.get(path[:-1], ROOT) for path, _ in candidates]
        depths = [len(path) for path, _ in candidates]
        prompts: list[int] = []
        for node, length in enumerate(chains, ROOT):
            first, depth = len(parents), depths[node] if node != ROOT else 0
            own = self._tokens.parents[: length * self._tokens.virtual]
            parents += [node if parent == ROOT else first + parent for parent in own]
            depths += [depth + 1 + row // self._tokens.virtual for row in range(len(own))]
            prompts += range(len(own))
        count = len(candidates)
        visible = self._visible(tuple(parents), count, prompts) if self._tokens.has_siblings else None
        return TokenTree.of(
            token_ids + [-1] * len(prompts),
            parents,
            candidate=[True] * count + [False] * len(prompts),
            needs=[Needs.NOTHING] * count + [Needs.LOGITS] * len(prompts),
            depths=depths,
            embeddings=self._rows[prompts] if prompts else None,
            visible=visible,
            chances=[chance for _, chance in candidates] + [0.0] * len(prompts),
        )

    def _visible(self, parents: tuple[int, ...], count: int, prompts: Sequence[int]) -> np.ndarray:
        """Prompt rows also see those of their own special token, which are no ancestors."""
        visible = TokenTree.of([0] * len(parents), parents).visibility().copy()
        for row, prompt in enumerate(prompts, count):
            first = row - prompt % self._tokens.virtual
            visible[row, first : first + self._tokens.virtual] = True
        return visible


def chain_rows(tree: TokenTree, node: int) -> list[int]:
    """The prompt rows that hang on a row, or on ROOT; they stand one after another."""
    owners: dict[int, int] = {}
    for row, token in enumerate(tree.token_ids):
        if token < 0:
            parent = tree.parents[row]
            owners[row] = owners.get(parent, parent)
    return [row for row, owner in owners.items() if owner == node]


@cache
def published_trees() -> Mapping[str, DynamicTree]:
    """PPD's own trees by name."""
    return read_dynamic_trees(Path(str(files("configs") / "trees" / "ppd.json")))
