"""Ordinary decoding: one token a step. Every other method's yardstick."""

from collections.abc import Sequence

from workers.decoding.interface import Budget, DraftThread, Method
from workers.model.tree import EMPTY_TREE, TokenTree


class Vanilla(Method):
    """Hangs nothing on the thread."""

    name = "vanilla"

    def draft(self, threads: Sequence[DraftThread], budget: Budget) -> list[TokenTree]:
        return [EMPTY_TREE] * len(threads)
