"""The equality tests notice faults: each mutation of drafting or verification changes some answer."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.decoding.test_methods import TEXTS, answers
from tests.support.tiny import tiny_engine
from workers import core
from workers.decoding.ngram import Ngram
from workers.model.tree import TokenTree
from workers.model.verification import Walker


class AcceptsTheFirstChild(Walker):
    """A wrong acceptance rule: the first child is accepted, whatever the model chose."""

    def take(self, token: int) -> None:
        first = [key for key in self._children if key[0] == self.node]
        super().take(first[0][1] if first else token)


class SwapsChildren(Walker):
    """The right child's token is emitted, but its sibling's row is kept and followed."""

    def take(self, token: int) -> None:
        parent = self.node
        super().take(token)
        siblings = [row for (above, _), row in self._children.items() if above == parent and row != self.node]
        if self.node != parent and siblings:
            self.node = self.walk.rows[-1] = siblings[0]


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
        (core, "Walker", AcceptsTheFirstChild),
        (core, "Walker", SwapsChildren),
        (Ngram, "draft", positions_off_by_one),
    ],
)
def test_a_mutation_shows(target: Any, name: str, mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, mutated = answered(lambda patch: patch.setattr(target, name, mutant), monkeypatch)
    assert mutated != plain


def test_without_a_mutation_nothing_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, same = answered(lambda patch: None, monkeypatch)
    assert same == plain
