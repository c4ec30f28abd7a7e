"""Medusa: heads on the last hidden state guess the next tokens, and a sparse tree of their best guesses is drafted."""

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from itertools import islice
from math import prod
from pathlib import Path

import torch

from workers.decoding.heads import MedusaHeads
from workers.decoding.int8_heads import Int8Heads
from workers.decoding.interface import Budget, DraftThread, Method, Outcome
from workers.decoding.sparse_tree import RankPath, SparseTree, best_paths, read_trees
from workers.decoding.trie import with_paths
from workers.model.tree import EMPTY_TREE, Needs, TokenTree

WIDTH = 10  # guesses of a head, as published
MOST_NODES = 64  # without a wish
STATE = "medusa"


class Medusa(Method):
    """Drafts the paths that are most probable by what the heads say in this step.

    The heads read the hidden state of the row that chose the thread's last token, and some read that token too; head 0
    guesses what follows it.
    """

    name = "medusa"
    root_needs = Needs.LOGITS | Needs.HIDDEN
    row_needs = Needs.HIDDEN

    def __init__(self, heads: MedusaHeads | Int8Heads) -> None:
        self._heads = heads
        self.trees = published_trees().keys()

    def draft(self, threads: Sequence[DraftThread], budget: Budget) -> list[TokenTree]:
        trees = [EMPTY_TREE] * len(threads)
        ready = [index for index, thread in enumerate(threads) if STATE in thread.state and _asks(thread, budget)]
        if not ready:
            return trees
        depth = min(len(self._heads), max(_depth(threads[index], budget) for index in ready))
        if depth < 1:
            return trees
        hidden = torch.stack([threads[index].state[STATE] for index in ready])
        chosen = [threads[index].token_ids[-1] for index in ready]
        guesses, chances = self._heads.guesses(hidden, chosen, depth, WIDTH)
        for index, own_tokens, own_chances in zip(ready, guesses, chances, strict=True):
            trees[index] = _tree(threads[index], own_tokens, own_chances, budget)
        return trees

    def observe(self, threads: Sequence[DraftThread], outcomes: Sequence[Outcome]) -> None:
        for thread, outcome in zip(threads, outcomes, strict=True):
            last = 1 + outcome.rows[-1] if outcome.rows else 0  # every row of the tree asked, after the root
            thread.state[STATE] = outcome.hidden[last].clone()  # a view would keep the whole step


@cache
def published_trees() -> dict[str, SparseTree]:
    """Medusa's own trees by name."""
    return read_trees(Path(str(files("configs") / "trees" / "medusa.json")))


def _asks(thread: DraftThread, budget: Budget) -> bool:
    """Heads take a tenth of a small model's step: a text that they cannot foresee is spared them."""
    return bool(thread.draft.nodes or thread.draft.tree) or budget.asks(thread)


def _depth(thread: DraftThread, budget: Budget) -> int:
    """How many heads a thread's tree can use."""
    tree = published_trees()[thread.draft.tree].depth if thread.draft.tree else MOST_NODES
    return min(tree, _most(thread, budget), thread.remaining)


def _most(thread: DraftThread, budget: Budget) -> int:
    return min(thread.draft.nodes or MOST_NODES, budget.rows)


def _tree(thread: DraftThread, tokens: list[list[int]], chances: list[list[float]], budget: Budget) -> TokenTree:
    nodes = _nodes(thread, chances[: thread.remaining], budget)
    paths = ((tuple(tokens[depth][rank] for depth, rank in enumerate(path)), chance) for path, chance in nodes)
    return with_paths(EMPTY_TREE, paths, needs=Medusa.row_needs)


def _nodes(thread: DraftThread, chances: list[list[float]], budget: Budget) -> list[tuple[RankPath, float]]:
    """Paths and their probabilities: the wished tree's, else the most probable ones."""
    most = _most(thread, budget)
    if thread.draft.tree:
        paths = [path for path in published_trees()[thread.draft.tree].paths if len(path) <= len(chances)]
        return [(path, prod(ranks[rank] for ranks, rank in zip(chances, path, strict=False))) for path in paths[:most]]
    nodes = list(islice(best_paths(chances), most))
    return nodes if thread.draft.nodes else nodes[: budget.worth(thread, [chance for _, chance in nodes])]
