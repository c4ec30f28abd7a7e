"""PPD: prompt tokens behind the last token and behind candidates guess what the next step drafts (Chen et al. 2024).

The prompt rows' keys and values are never kept. The guesses of the node at which acceptance ends are the next step's
candidates; how many there are is the *state* of that step.
"""

from collections import Counter
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
from workers.decoding.prompt_plan import COUNTS, end_chances, plan_rows
from workers.decoding.prompt_tokens import PromptTokens
from workers.decoding.sparse_tree import RankPath, best_paths
from workers.decoding.trie import with_paths
from workers.model.tree import EMPTY_TREE, Needs, TokenTree, ancestor_closure
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
            chain = chains_of(outcome.tree).get(outcome.rows[-1] if outcome.rows else ROOT)
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

    def complete(self, tree: TokenTree, thread: DraftThread, budget: Budget) -> TokenTree:
        """Chains behind candidates that others found, as many as are worth their rows."""
        chains = chains_of(tree)
        bare = [row for row, candidate in enumerate(tree.candidate) if candidate and row not in chains]
        if not bare or len(tree.chances) < len(tree):
            return tree
        gains = self._foreseen(thread).gains
        ends = end_chances(tree.parents, tree.chances)[1:].tolist()
        worth = sorted(((ends[row] * gain, row) for row in bare for gain in gains), reverse=True)
        virtual = self._tokens.virtual
        room = min(thread.draft.nodes or MOST_ROWS, budget.rows - len(tree)) // virtual
        values = [value / virtual for value, _ in worth[: max(0, room)] for _ in range(virtual)]
        kept = len(values) if thread.draft.nodes else budget.worth(thread, values, beside=len(tree))
        return self._with_chains(tree, Counter(row for _, row in worth[: kept // virtual]), thread.remaining)

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
        paths = (
            (tuple(foreseen.tokens[depth][rank] for depth, rank in enumerate(path)), chance) for path, chance in nodes
        )
        return self._with_chains(with_paths(EMPTY_TREE, paths), dict(enumerate(chains, ROOT)), thread.remaining)

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

    def _with_chains(self, tree: TokenTree, chains: Mapping[int, int], remaining: int) -> TokenTree:
        """The tree and behind it chains of prompt tokens by the rows (or ROOT) on which they hang: their lengths.

        What nobody will ask for is left out: beyond the answer's end there may be no positions either.
        """
        parents, depths = list(tree.parents), list(tree.depths)
        prompts: list[int] = []
        for node, length in chains.items():
            first, depth = len(parents), depths[node] if node != ROOT else 0
            own = self._tokens.parents[: max(0, min(length, remaining - depth - 1)) * self._tokens.virtual]
            parents += [node if parent == ROOT else first + parent for parent in own]
            depths += [depth + 1 + row // self._tokens.virtual for row in range(len(own))]
            prompts += range(len(own))
        if not prompts:
            return tree
        embeddings = self._rows[prompts]
        return TokenTree.of(
            [*tree.token_ids, *[-1] * len(prompts)],
            parents,
            candidate=[*tree.candidate, *[False] * len(prompts)],
            needs=[*tree.needs, *[Needs.LOGITS] * len(prompts)],
            depths=depths,
            embeddings=embeddings if tree.embeddings is None else torch.cat([tree.embeddings, embeddings]),
            visible=self._visible(tree, parents, prompts) if self._tokens.has_siblings else None,
            chances=[*tree.chances, *[0.0] * len(prompts)],
        )

    def _visible(self, tree: TokenTree, parents: Sequence[int], prompts: Sequence[int]) -> np.ndarray:
        """Prompt rows also see those of their own special token, which are no ancestors."""
        visible = ancestor_closure(tuple(parents)).copy()
        visible[: len(tree), : len(tree)] = tree.visibility()
        for row, prompt in enumerate(prompts, len(tree)):
            first = row - prompt % self._tokens.virtual
            visible[row, first : first + self._tokens.virtual] = True
        return visible


def chains_of(tree: TokenTree) -> dict[int, list[int]]:
    """The prompt rows by the row, or ROOT, on which they hang; they stand one after another."""
    owners: dict[int, int] = {}
    chains: dict[int, list[int]] = {}
    for row, token in enumerate(tree.token_ids):
        if token < 0:
            parent = tree.parents[row]
            owners[row] = owners.get(parent, parent)
            chains.setdefault(owners[row], []).append(row)
    return chains


@cache
def published_trees() -> Mapping[str, DynamicTree]:
    """PPD's own trees by name."""
    return read_dynamic_trees(Path(str(files("configs") / "trees" / "ppd.json")))
