"""The equality tests notice faults: each mutation of drafting or verification changes some answer."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from tests.decoding.test_methods import TEXTS, answers
from tests.support.tiny import tiny_engine
from workers import core
from workers.decoding.ngram import Ngram
from workers.model.tree import TokenTree
from workers.model.verification import ROOT, Walk


def greedy_for_length(tree: TokenTree, choices: Mapping[int, int], *, limit: int, terminal: Any) -> Walk:
    """A wrong acceptance rule: the first child is accepted, whatever the model chose."""
    if limit < 2 or not tree:
        return Walk([], [choices[ROOT]])
    return Walk([0], [tree.token_ids[0], choices[0]])


def swapped_children(tree: TokenTree, choices: Mapping[int, int], *, limit: int, terminal: Any) -> Walk:
    """The right child's token is emitted, but its sibling's row is kept and followed."""
    right = core_walk(tree, choices, limit=limit, terminal=terminal)
    siblings = [row for row, parent in enumerate(tree.parents) if parent == ROOT and row not in right.rows]
    if not right.rows or not siblings or limit < 2:
        return right
    return Walk([siblings[0]], [right.token_ids[0], choices[siblings[0]]])


core_walk = core.walk
draft = Ngram.draft


def positions_off_by_one(self: Ngram, threads: Any, budget: Any) -> list[TokenTree]:
    return [replace(tree, depths=[depth + 1 for depth in tree.depths]) for tree in draft(self, threads, budget)]


def answered(patch: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Vanilla's and the mutated n-gram answers."""
    asked = [{"prompt": text, "temperature": 0, "max_new_tokens": 48, "draft": {"nodes": 12}} for text in TEXTS]
    with tiny_engine(methods=["ngram"]) as engine:
        plain = answers(engine, [{**request, "method": "vanilla"} for request in asked])
        patch(monkeypatch)
        return plain, answers(engine, [{**request, "method": "ngram"} for request in asked])


@pytest.mark.parametrize(
    ("target", "name", "mutant"),
    [
        (core, "walk", greedy_for_length),
        (core, "walk", swapped_children),
        (Ngram, "draft", positions_off_by_one),
    ],
)
def test_a_mutation_shows(target: Any, name: str, mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, mutated = answered(lambda patch: patch.setattr(target, name, mutant), monkeypatch)
    assert mutated != plain


def test_without_a_mutation_nothing_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, same = answered(lambda patch: None, monkeypatch)
    assert same == plain
