"""Candidates merged into a tree, so that shared prefixes cost one row."""

from collections.abc import Iterable

import numpy as np

from workers.model.tree import EMPTY_TREE, Needs, TokenTree
from workers.model.verification import ROOT


class Trie:
    """Candidate rows behind those of a tree (by default an empty one); the tree's own rows keep their numbers."""

    def __init__(self, tree: TokenTree = EMPTY_TREE, *, needs: Needs = Needs.NOTHING) -> None:
        """``needs``: what the added rows want back beside their logits."""
        self._tree = tree
        self._needs = needs
        self._token_ids = list(tree.token_ids)
        self._parents = list(tree.parents)
        self._chances = list(tree.chances)
        self._children: dict[tuple[int, int], int] = {}
        for row, candidate in enumerate(tree.candidate):
            if candidate:
                self._children.setdefault((tree.parents[row], tree.token_ids[row]), row)

    def __len__(self) -> int:
        return len(self._token_ids)

    def has(self, parent: int, token: int) -> bool:
        """Whether ``token`` is a candidate below row ``parent`` (or ROOT)."""
        return (parent, token) in self._children

    def add(self, parent: int, token: int, chance: float | None = None) -> int:
        """The row of the candidate ``token`` below ``parent``, new or not."""
        row = self._children.get((parent, token))
        if row is None:
            row = self._children[parent, token] = len(self)
            self._token_ids.append(token)
            self._parents.append(parent)
            if chance is not None:
                self._chances.append(chance)
        return row

    def tree(self) -> TokenTree:
        """The whole."""
        added = len(self) - len(self._tree)
        if not added:
            return self._tree
        depths = list(self._tree.depths)
        for parent in self._parents[len(depths) :]:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return TokenTree.of(
            self._token_ids,
            self._parents,
            candidate=[*self._tree.candidate, *[True] * added],
            needs=[*self._tree.needs, *[self._needs] * added],
            depths=depths,
            embeddings=self._tree.embeddings,
            visible=None if self._tree.visible is None else self._visible(self._tree.visible),
            chances=self._chances if len(self._chances) == len(self) else (),
        )

    def _visible(self, given: np.ndarray) -> np.ndarray:
        """The tree's own visibility, and for the rows behind it their parents' and themselves."""
        visible = np.zeros((len(self), len(self)), dtype=bool)
        visible[: len(given), : len(given)] = given
        for row in range(len(given), len(self)):
            if self._parents[row] != ROOT:
                visible[row] = visible[self._parents[row]]
            visible[row, row] = True
        return visible


def with_paths(
    tree: TokenTree, paths: Iterable[tuple[tuple[int, ...], float]], *, needs: Needs = Needs.NOTHING
) -> TokenTree:
    """The tree and candidates behind it: paths of tokens, each behind its beginning, with their probabilities."""
    trie = Trie(tree, needs=needs)
    rows: dict[tuple[int, ...], int] = {(): ROOT}
    for path, chance in paths:
        rows[path] = trie.add(rows[path[:-1]], path[-1], chance)
    return trie.tree()
