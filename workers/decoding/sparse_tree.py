"""Sparse trees of ranks: which guesses of which depth are drafted together (Medusa, Cai et al. 2024).

A path is a tuple of ranks: element d is the rank, from 0, of a guess for the token d + 1 behind the root. A tree is its
paths, each behind its beginning; the first n of a searched tree are the best tree of n nodes.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import islice
from pathlib import Path

RankPath = tuple[int, ...]


class BadTree(Exception):
    """A tree that cannot be used; the message is one line."""


@dataclass(frozen=True)
class SparseTree:
    """Nodes by their paths; see the module."""

    paths: tuple[RankPath, ...]

    @classmethod
    def of(cls, paths: Sequence[Sequence[int]]) -> "SparseTree":
        """A checked tree; paths that stand before their beginnings are put in order of length. Raises BadTree."""
        made = [tuple(path) for path in paths]
        if not made or any(not path or min(path) < 0 for path in made):
            raise BadTree("a tree is a list of paths, each a list of ranks from 0")
        if len(set(made)) < len(made):
            raise BadTree("a path occurs twice")
        known = set(made)
        if lost := next((path for path in made if len(path) > 1 and path[:-1] not in known), None):
            raise BadTree(f"path {list(lost)} is there without its beginning {list(lost[:-1])}")
        places = {path: place for place, path in enumerate(made)}
        if any(len(path) > 1 and places[path[:-1]] > places[path] for path in made):
            made.sort(key=lambda path: (len(path), path))
        return cls(tuple(made))

    @property
    def depth(self) -> int:
        return max(map(len, self.paths))


def read_trees(path: Path) -> dict[str, SparseTree]:
    """Trees of a JSON file: a list of paths (named after the file), or an object of them. Raises BadTree."""
    try:
        content = json.loads(path.read_text("utf-8"))
        named = content if isinstance(content, dict) else {path.stem: content}
        return {name: SparseTree.of(paths) for name, paths in named.items()}
    except BadTree as error:
        raise BadTree(f"{path}: {error}") from None
    except (OSError, ValueError, TypeError) as error:
        raise BadTree(f"{path}: cannot be read as trees: {error}") from None


def best_paths(chances: Sequence[Sequence[float]]) -> Iterator[tuple[RankPath, float]]:
    """Paths from the most probable one on, if depths are right independently of each other.

    Args:
        chances: [depth][rank], falling with the rank.
    """
    if not chances or not chances[0]:
        return
    heap: list[tuple[float, RankPath, float]] = [(-chances[0][0], (0,), 1.0)]
    while heap:
        negative, path, above = heappop(heap)
        yield path, -negative
        depth, rank = len(path), path[-1]
        if rank + 1 < len(chances[depth - 1]):
            heappush(heap, (-above * chances[depth - 1][rank + 1], (*path[:-1], rank + 1), above))
        if depth < len(chances) and chances[depth]:
            heappush(heap, (negative * chances[depth][0], (*path, 0), -negative))


def search_tree(accuracies: Sequence[Sequence[float]], size: int) -> SparseTree:
    """The tree of at most ``size`` nodes that accepts most, by measured accuracies [head][rank]."""
    falling = [sorted(ranks, reverse=True) for ranks in accuracies]
    return SparseTree(tuple(path for path, _ in islice(best_paths(falling), size)))
