"""Token trees: what a method hangs on a thread's last token in one step.

A row holds a token id or an embedding and sees the whole committed path, its ancestors and itself. The *root* is the
thread's last committed token; it is not a row of the tree, and a parent of -1 means it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from functools import lru_cache

import numpy as np
import torch


class Needs(IntFlag):
    """What a row wants back from the forward pass."""

    NOTHING = 0
    LOGITS = 1
    HIDDEN = 2


@lru_cache(maxsize=1024)
def tree_depths(parents: tuple[int, ...]) -> tuple[int, ...]:
    """Depth of every row; a child of the root has depth 1."""
    depths: list[int] = []
    for parent in parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return tuple(depths)


@lru_cache(maxsize=1024)
def ancestor_closure(parents: tuple[int, ...]) -> np.ndarray:
    """bool[T, T]: true where the column is the row itself or one of its ancestors."""
    closure = np.eye(len(parents), dtype=bool)
    for row, parent in enumerate(parents):
        if parent >= 0:
            closure[row] |= closure[parent]
    closure.setflags(write=False)
    return closure


@dataclass(frozen=True)
class TokenTree:
    """T rows in topological order (every parent stands before its children).

    Attributes:
        token_ids: T ids; -1 marks a row that takes the next row of ``embeddings`` instead.
        parents: T row indices below the row's own, or -1 for the root.
        candidate: T flags; only a candidate may be accepted into the answer.
        needs: T flags; a candidate always gets its logits.
        depths: T offsets of the row's position from the root's; by default the depth in the tree (1, 2, …).
        embeddings: float[E, hidden] for the E rows whose token id is -1.
        visible: bool[T, T] that replaces the ancestor closure; row i sees row j where it is true.
        chances: T probabilities of acceptance as the method estimates them (0 for rows that are no candidates); or ().
    """

    token_ids: Sequence[int]
    parents: Sequence[int]
    candidate: Sequence[bool]
    needs: Sequence[Needs]
    depths: Sequence[int]
    embeddings: torch.Tensor | None = None
    visible: np.ndarray | None = None
    chances: Sequence[float] = ()

    @classmethod
    def of(
        cls,
        token_ids: Sequence[int],
        parents: Sequence[int],
        *,
        candidate: Sequence[bool] | None = None,
        needs: Sequence[Needs] | None = None,
        depths: Sequence[int] | None = None,
        embeddings: torch.Tensor | None = None,
        visible: np.ndarray | None = None,
        chances: Sequence[float] = (),
    ) -> "TokenTree":
        """A checked tree with defaults: every row a candidate, at the position of its depth.

        Raises:
            ValueError: lengths that disagree, a parent after its child, or a missing embedding.
        """
        size = len(token_ids)
        if any(not -1 <= parent < row for row, parent in enumerate(parents)):
            raise ValueError("a parent must be -1 or stand before its child")
        tree = cls(
            token_ids=token_ids,
            parents=parents,
            candidate=[True] * size if candidate is None else candidate,
            needs=[Needs.NOTHING] * size if needs is None else needs,
            depths=tree_depths(tuple(parents)) if depths is None else depths,
            embeddings=embeddings,
            visible=visible,
            chances=chances,
        )
        tree._check()
        return tree

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def max_accepted(self) -> int:
        """The most rows that one walk from the root can accept."""
        length = [0] * len(self)
        for row, parent in enumerate(self.parents):
            if self.candidate[row]:
                length[row] = 1 + (length[parent] if parent >= 0 else 0)
        return max(length, default=0)

    def visibility(self) -> np.ndarray:
        """bool[T, T]: which rows each row sees."""
        return self.visible if self.visible is not None else ancestor_closure(tuple(self.parents))

    def _check(self) -> None:
        size = len(self)
        columns = (self.parents, self.candidate, self.needs, self.depths)
        if any(len(column) != size for column in columns):
            raise ValueError("every column of a token tree must have one entry a row")
        embedded = sum(token < 0 for token in self.token_ids)
        if embedded != (0 if self.embeddings is None else len(self.embeddings)):
            raise ValueError("rows with token id -1 and embeddings must be equally many")
        if any(token < 0 and candidate for token, candidate in zip(self.token_ids, self.candidate, strict=True)):
            raise ValueError("a row without a token id cannot be a candidate")
        if self.visible is not None and self.visible.shape != (size, size):
            raise ValueError("visible must be bool[T, T]")


EMPTY_TREE = TokenTree.of([], [])
