"""Dynamic sparse trees (PPD, Chen et al. 2024): which guesses a step drafts, and how far each of them looks ahead.

A step begins in state k if k prompt tokens guessed behind the token that was accepted last; its tree is at most k deep.
Every candidate carries a chain of prompt tokens, and the length of the chain behind the candidate at which acceptance
stops is the next state. The root carries the whole chain of S, so a step that accepts nothing is followed by state S.
"""

import ast
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from workers.decoding.sparse_tree import BadTree, RankPath, SparseTree

RESTART = 1e-9  # probability that an answer ends with a step: the next one begins in the last state
ROUNDING = 0.01  # published probabilities have five digits, and a tree hundreds of them


@dataclass(frozen=True)
class PromptNode:
    """A candidate.

    Attributes:
        path: ranks of the guesses from the root's child on.
        ends: probability that acceptance stops exactly here.
        prompts: length of its chain of prompt tokens, from 1.
    """

    path: RankPath
    ends: float
    prompts: int


@dataclass(frozen=True)
class DynamicTree:
    """Nodes of every state, each behind its parent; those of state k at index k - 1."""

    states: tuple[tuple[PromptNode, ...], ...]

    @classmethod
    def of(cls, states: Sequence[Sequence[PromptNode]]) -> "DynamicTree":
        """A checked tree; nodes that stand before their parents are put in order of length.

        Raises:
            BadTree: no state or an empty one, a path that occurs twice, lacks its beginning or is deeper than its
                state, a negative rank, a chain shorter than 1 or longer than S, a probability that is none.
        """
        if not states:
            raise BadTree("a dynamic tree has at least one state")
        return cls(tuple(_checked(nodes, state, len(states)) for state, nodes in enumerate(states, 1)))

    @property
    def special(self) -> int:
        """S: prompt tokens behind the root."""
        return len(self.states)

    @property
    def widths(self) -> tuple[int, ...]:
        """Rows of each state's step: the root's chain, the candidates and their chains, without the root itself."""
        return tuple(self.special + sum(1 + node.prompts for node in nodes) for nodes in self.states)


def _checked(nodes: Sequence[PromptNode], state: int, special: int) -> tuple[PromptNode, ...]:
    if not nodes:
        raise BadTree(f"state {state} has no nodes")
    try:
        paths = SparseTree.of([node.path for node in nodes]).paths
    except BadTree as error:
        raise BadTree(f"state {state}: {error}") from None
    for node in nodes:
        if len(node.path) > state:
            raise BadTree(f"state {state}: path {list(node.path)} is deeper than {state}")
        if not 1 <= node.prompts <= special:
            raise BadTree(f"state {state}: path {list(node.path)} has {node.prompts} prompts, not 1 to {special}")
        if not isfinite(node.ends):
            raise BadTree(f"state {state}: path {list(node.path)} ends with {node.ends}, not a probability")
    known = {node.path: node for node in nodes}
    return tuple(known[path] for path in paths)


def next_states(ends: np.ndarray, prompts: np.ndarray, special: int) -> np.ndarray:
    """float[S]: probabilities of the next state being 1 to S because a candidate was accepted; of float[m], int[m]."""
    return np.bincount(prompts - 1, weights=ends, minlength=special)


def long_run(rewards: np.ndarray, moves: np.ndarray) -> tuple[float, np.ndarray]:
    """Howard's (1960) valuation of a Markov chain.

    Args:
        rewards: float[K], what a step in each state brings.
        moves: float[K, K], probabilities from each state (row) to each.

    Returns:
        The mean reward of a step; float[K], what a start in each state brings more than a start in the last.
    """
    system = np.eye(len(rewards)) - (1 - RESTART) * moves
    system[:, -1] = 1  # the last state's own value is 0, so its column is free for the mean
    *values, mean = np.linalg.solve(system, rewards)
    return float(mean), np.array([*values, 0.0])


def expected_tokens(tree: DynamicTree) -> float:
    """Tokens that a step emits in the long run, its root included, by the probabilities in the tree.

    Raises:
        BadTree: the probabilities of a state are not those of exclusive events.
    """
    rewards, moves = [], []
    for state, nodes in enumerate(tree.states, 1):
        ends = np.array([node.ends for node in nodes])
        if (total := ends.sum()) > 1 + ROUNDING or ends.min() < -ROUNDING:
            raise BadTree(f"state {state}: its probabilities sum to {total:.2f}, or one is negative")
        accepted = next_states(ends, np.array([node.prompts for node in nodes]), tree.special)
        accepted[-1] += max(1 - total, 0)  # the root's own chain
        moves.append(accepted)
        rewards.append(1 + sum(node.ends * len(node.path) for node in nodes))
    return long_run(np.array(rewards), np.array(moves))[0]


def read_dynamic_trees(path: Path) -> dict[str, DynamicTree]:
    """Trees of a file by name, states by number: ``{"1": [[path, ends, prompts], ...], "2": ...}``.

    JSON holds one tree (named after the file) or an object of them; a ``.py`` file of the published form assigns them
    to its names, and is parsed but never run. Raises BadTree.
    """
    try:
        text = path.read_text("utf-8")
        named = dict(_assigned(text)) if path.suffix == ".py" else _named(json.loads(text), path.stem)
        if not named:
            raise BadTree("there is no tree in it")
        return {name: _tree(name, content) for name, content in named.items()}
    except BadTree as error:
        raise BadTree(f"{path}: {error}") from None
    except (OSError, ValueError, TypeError, OverflowError, SyntaxError, RecursionError, MemoryError) as error:
        raise BadTree(f"{path}: cannot be read as dynamic trees: {error}") from None


def trees_json(trees: Mapping[str, DynamicTree]) -> str:
    """What ``read_dynamic_trees`` reads, a tree a line; probabilities are rounded to six digits."""
    lines = (f"{json.dumps(name)}:{json.dumps(_content(tree), separators=(',', ':'))}" for name, tree in trees.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _content(tree: DynamicTree) -> dict[str, list[Any]]:
    return {
        str(state): [[node.path, round(node.ends, 6), node.prompts] for node in nodes]
        for state, nodes in enumerate(tree.states, 1)
    }


def _named(content: Any, stem: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise BadTree("a dynamic tree is an object of states")
    return content if all(isinstance(value, dict) for value in content.values()) else {stem: content}


def _assigned(source: str) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Dict literals assigned to plain names at the top of a module; everything else in it is passed over."""
    for statement in ast.parse(source).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Dict() as value):
                try:
                    yield name, ast.literal_eval(value)
                except ValueError:  # it holds more than literals
                    continue


def _tree(name: str, content: Mapping[Any, Any]) -> DynamicTree:
    numbered = {int(state): entries for state, entries in content.items()}
    if sorted(numbered) != list(range(1, len(numbered) + 1)):
        raise BadTree(f"{name!r}: states are numbered from 1 without gaps, not {sorted(numbered)}")
    try:
        states = [[_node(entry, len(numbered)) for entry in numbered[state]] for state in sorted(numbered)]
        return _stopping(DynamicTree.of(states))
    except BadTree as error:
        raise BadTree(f"{name!r}: {error}") from None


def _node(entry: Any, special: int) -> PromptNode:
    match entry:
        case [[*path], int() | float() as ends, int(prompts)] if all(type(rank) is int for rank in path):
            # The published random trees have chains longer than S, of which only S prompt tokens exist.
            return PromptNode(tuple(path), float(ends), min(prompts, special))
    raise BadTree(f"an entry is [path, probability, prompts], not {entry!r:.60}")


def _stopping(tree: DynamicTree) -> DynamicTree:
    """A tree with the probabilities to stop at its nodes, if it holds those to reach them.

    Some published files do (two prompt tokens for 13B, full trees): there a node that gets children keeps its number.
    """
    alone = {node.path: node.ends for node in tree.states[0]}
    kept = []
    for nodes in tree.states[1:]:
        parents = {node.path[:-1] for node in nodes} & alone.keys()
        kept += [node.ends == alone[node.path] for node in nodes if node.path in parents]
    return DynamicTree(tuple(map(_less_children, tree.states))) if kept and all(kept) else tree


def _less_children(nodes: Sequence[PromptNode]) -> tuple[PromptNode, ...]:
    children: defaultdict[RankPath, float] = defaultdict(float)
    for node in nodes:
        children[node.path[:-1]] += node.ends
    return tuple(replace(node, ends=node.ends - children[node.path]) for node in nodes)
