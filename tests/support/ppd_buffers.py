"""A dynamic tree's step in the layout of the published implementation (PPD, Chen et al. 2024), to compare with it.

Row 0 is the root; the others are sorted by depth, then by path, where prompt token i has the label -i. *Candidate
numbers* count the rows that hold tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from workers.decoding.dynamic_tree import PromptNode
from workers.decoding.sparse_tree import BadTree, RankPath

GUESSES = 10  # of each prompt token


@dataclass(frozen=True)
class Buffers:
    """R rows with C candidates, L of them leaves, at most D deep.

    Attributes:
        position_ids: int[R], depth.
        attn_mask: bool[R, R], true where the column is the row itself or one of its ancestors.
        tree_indices: int[R] into [root, ten guesses of each prompt token, S prompt tokens]; the last ones from the end.
        normal_token_indices: int[C], rows of the candidates.
        special_token_indices: for each candidate number, the rows of its chain.
        retrieve_indices: int[L, D + 1], candidate numbers from the root to each leaf, filled up with -1.
    """

    position_ids: np.ndarray
    attn_mask: np.ndarray
    tree_indices: np.ndarray
    normal_token_indices: np.ndarray
    special_token_indices: tuple[tuple[int, ...], ...]
    retrieve_indices: np.ndarray


def buffers(state_nodes: Sequence[PromptNode], special: int) -> Buffers:
    """Buffers of a state's step; ``special`` is S. Raises BadTree if a rank is beyond the ten guesses."""
    if any(max(node.path) >= GUESSES for node in state_nodes):
        raise BadTree(f"the published layout has {GUESSES} guesses of a prompt token")
    lengths = {(): special} | {node.path: node.prompts for node in state_nodes}
    candidates = sorted(lengths, key=_order)
    chains = {path: [path + _chain(end) for end in range(1, lengths[path] + 1)] for path in candidates}
    rows = sorted([*candidates, *(path for chain in chains.values() for path in chain)], key=_order)
    places = {path: row for row, path in enumerate(rows)}
    mask = np.zeros((len(rows), len(rows)), dtype=bool)
    for row, path in enumerate(rows):
        mask[row, [places[path[:end]] for end in range(len(path) + 1)]] = True
    return Buffers(
        position_ids=np.array([len(path) for path in rows]),
        attn_mask=mask,
        tree_indices=np.array([_index(path, special) for path in rows]),
        normal_token_indices=np.array([places[path] for path in candidates]),
        special_token_indices=tuple(tuple(places[path] for path in chains[owner]) for owner in candidates),
        retrieve_indices=_retrieval(candidates),
    )


def _order(path: RankPath) -> tuple[int, RankPath]:
    return len(path), path


def _chain(length: int) -> RankPath:
    return tuple(range(-1, -length - 1, -1))


def _index(path: RankPath, special: int) -> int:
    if not path:
        return 0
    return path[-1] + GUESSES * (len(path) - 1) + 1 if path[-1] >= 0 else -(special + path[-1] + 1)


def _retrieval(candidates: Sequence[RankPath]) -> np.ndarray:
    numbers = {path: number for number, path in enumerate(candidates)}
    inner = {path[:-1] for path in candidates[1:]}
    leaves = [path for path in reversed(candidates) if path not in inner]
    retrieval = np.full((len(leaves), len(candidates[-1]) + 1), -1)
    for row, leaf in enumerate(leaves):
        retrieval[row, : len(leaf) + 1] = [numbers[leaf[:end]] for end in range(len(leaf) + 1)]
    return retrieval
