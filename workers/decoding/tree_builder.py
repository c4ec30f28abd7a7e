"""Dynamic sparse trees from measured accuracies (PPD, Chen et al. 2024), for any number of prompt tokens and of rows.

Depths are taken to be right independently of each other, so a state's best m candidates are its m most probable paths.
What is left to choose, for each state: m, and which candidates get the longer chains. A longer chain pays in the steps
that follow, so these choices depend on each other through what a start in each state is worth.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, product

import numpy as np

from workers.decoding.dynamic_tree import DynamicTree, PromptNode, long_run, next_states
from workers.decoding.sparse_tree import RankPath, best_paths

ROUNDS = 50  # far more than the iteration needs
FIRST = 10  # candidates of state 1 in the published builder
DIGITS = 5  # of a path's probability in the published builder
TOLERANCE = 1e-6


@dataclass(frozen=True)
class _Step:
    """A state's tree of m nodes.

    Attributes:
        paths: m of them.
        ends: float[m], probabilities that acceptance stops there.
        prompts: int[m], lengths of their chains.
        accepted: expected number of accepted candidates.
    """

    paths: Sequence[RankPath]
    ends: np.ndarray
    prompts: np.ndarray
    accepted: float

    def worth(self, values: np.ndarray) -> float:
        """Of this step and all that follow, by the values of a start in each state; the last one's is 0."""
        return self.accepted + float(self.ends @ values[self.prompts - 1])

    def nodes(self) -> list[PromptNode]:
        return list(map(PromptNode, self.paths, self.ends.tolist(), self.prompts.tolist()))


@dataclass(frozen=True)
class _State:
    """A state's most probable paths.

    Attributes:
        paths: n of them, the most probable first.
        chances: float[n], probabilities of reaching them.
        parents: int[n], their parents' indices; -1 for the root.
    """

    paths: Sequence[RankPath]
    chances: np.ndarray
    parents: np.ndarray

    @classmethod
    def of(cls, accuracies: Sequence[np.ndarray], most: int, digits: int | None) -> "_State":
        orders = [np.argsort(-ranks, kind="stable").tolist() for ranks in accuracies]
        falling = [ranks[order].tolist() for ranks, order in zip(accuracies, orders, strict=True)]
        found = list(islice(best_paths(falling), most))
        paths = [tuple(order[rank] for order, rank in zip(orders, path, strict=False)) for path, _ in found]
        places = {path: place for place, path in enumerate(paths)}
        parents = np.array([places.get(path[:-1], -1) for path in paths])
        chances = [chance if digits is None else round(chance, digits) for _, chance in found]
        return cls(paths, np.array(chances), parents)

    def accepted(self, count: int) -> float:
        return float(self.chances[:count].sum())

    def step(self, count: int, room: int, gains: np.ndarray) -> _Step:
        """The tree of the first ``count`` nodes, with at most ``room`` prompts where those are worth most."""
        chances = self.chances[:count]
        ends = chances - np.bincount(self.parents[:count] + 1, chances, len(chances) + 1)[1:]
        return _Step(self.paths[:count], ends, _chains(ends, gains, room), float(chances.sum()))


def build_tree(accuracies: Sequence[Sequence[float]], rows: int, *, reference: bool = False) -> DynamicTree:
    """The dynamic tree that emits most tokens a step.

    Args:
        accuracies: [S][ranks], S and each number of ranks at least 1: probability that the guess of that rank by
            prompt token d + 1 is right; those of one prompt token sum to at most 1.
        rows: most candidates and their prompts in a step, without the root and its chain: at least 2.
        reference: as the published builder does it: ten nodes in state 1, every size from rows / (S + 1) to rows / 2
            in the others, and an objective in which a step that accepts nothing takes a second one. It needs twice
            as many rows as nodes in state 1, and its time grows with the power S - 1 of the rows.

    Raises:
        ValueError: accuracies or rows that are not as above.
    """
    table = [np.array(ranks, dtype=float) for ranks in accuracies]
    _check(table, rows, reference)
    most, digits = (max(rows // 2, FIRST), DIGITS) if reference else (rows // 2, None)
    states = [_State.of(table[:depth], most, digits) for depth in range(1, len(table) + 1)]
    steps = _published(states, rows) if reference else _best(states, rows)
    return DynamicTree.of([step.nodes() for step in steps])


def _check(table: Sequence[np.ndarray], rows: int, reference: bool) -> None:
    if not table or not all(ranks.ndim == 1 and ranks.size for ranks in table):
        raise ValueError("accuracies are [prompt token][rank], with at least one rank each")
    if not all(ranks.min() >= 0 and ranks.sum() <= 1 + TOLERANCE for ranks in table):
        raise ValueError("accuracies of one prompt token are probabilities that sum to at most 1")
    fewest = 2 * min(FIRST, len(table[0])) if reference else 2
    if rows < fewest:
        raise ValueError(f"a dynamic tree needs at least {fewest} rows here, not {rows}")


def _chains(ends: np.ndarray, gains: np.ndarray, room: int) -> np.ndarray:
    """int[m] lengths of chains that sum to at most ``room``: prompts are taken from whole chains, the least loss first.

    Args:
        ends: float[m].
        gains: float[S - 1], what a start in state 2 to S is worth over one in the state before.
        room: at least m.
    """
    special = len(gains) + 1
    # A loss is open only after those of longer chains at the same node, so it is at least as late as they are.
    losses = np.maximum.accumulate(ends[:, None] * gains[::-1], axis=1)
    taken = np.argsort(losses, axis=None, kind="stable")[: max(special * len(ends) - room, 0)]
    return special - np.bincount(taken // max(special - 1, 1), minlength=len(ends))


def _best(states: Sequence[_State], rows: int) -> list[_Step]:
    """Policy iteration (Howard 1960): for given values of a start in each state, each state's choice is its own."""
    special = len(states)
    steps: list[_Step] = []
    values, most = np.arange(1.0 - special, 1.0), 0.0
    for _ in range(ROUNDS):
        improved = _best_steps(states, rows, values)
        moves = np.array([next_states(step.ends, step.prompts, special) for step in improved])
        moves[:, -1] += 1 - moves.sum(axis=1)
        mean, after = long_run(np.array([step.accepted for step in improved]), moves)
        if mean >= most:
            steps, most = improved, mean
        if np.allclose(after, values, rtol=0, atol=1e-12):
            break
        values = after
    return steps


def _best_steps(states: Sequence[_State], rows: int, values: np.ndarray) -> list[_Step]:
    def best(steps: Iterable[_Step]) -> _Step:
        return max(steps, key=lambda step: step.worth(values))

    def own(state: _State) -> _Step:
        sizes = range(1, min(rows // 2, len(state.paths)) + 1)
        return best(state.step(size, rows - size, np.diff(values)) for size in sizes)

    # The tree of a state before may be worth more: the most probable paths are not always those with the best chains.
    return list(accumulate(map(own, states), lambda before, this: best((this, before))))


def _published(states: Sequence[_State], rows: int) -> list[_Step]:
    return max(_combinations(states, rows), key=_published_score)


def _combinations(states: Sequence[_State], rows: int) -> Iterator[list[_Step]]:
    special = len(states)
    sizes = range(rows // (special + 1), rows // 2 + 1)
    for counts in product([min(FIRST, len(states[0].paths))], *[sizes] * (special - 1)):
        accepted = [state.accepted(count) for state, count in zip(states, counts, strict=True)]
        gains = np.diff(accepted)
        yield [state.step(count, rows - count, gains) for state, count in zip(states, counts, strict=True)]


def _published_score(steps: Sequence[_Step]) -> float:
    """Accepted candidates a step, where nothing accepted is a state of its own that takes a step to reach the last."""
    special = len(steps)
    moves = np.zeros((special + 1, special + 1))
    moves[0, -1] = 1
    moves[1:, 1:] = [next_states(step.ends, step.prompts, special) for step in steps]
    moves[1:, 0] = 1 - moves[1:].sum(axis=1)
    return long_run(np.array([0, *(step.accepted for step in steps)]), moves)[0]
