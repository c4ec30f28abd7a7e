"""Typical acceptance: the longest path of typical tokens; lossy only where it is asked for and something is drawn."""

import math
from typing import Any

import pytest
import torch

from tests.decoding.test_methods import answers, requests
from tests.support.tiny import tiny_engine
from workers.model.sampling import Row, Sampling, typical
from workers.model.tree import TokenTree
from workers.model.verification import ROOT, Walker

#      root
#     0    1
#     2    3
#          4
TREE = TokenTree.of([5, 6, 7, 8, 9], [-1, -1, 0, 1, 3])
CHOICES = {ROOT: 1, 0: 2, 1: 3, 2: 4, 3: 5, 4: 6}


@pytest.mark.parametrize(
    ("scores", "limit", "terminal", "rows", "token_ids"),
    [
        ({}, 9, (), [], [1]),
        ({0: -1.0, 1: -2.0}, 9, (), [0], [5, 2]),  # of equally long paths the likelier one
        ({0: -1.0, 2: -1.0, 1: -5.0, 3: -5.0, 4: -5.0}, 9, (), [1, 3, 4], [6, 8, 9, 6]),  # the longest one
        ({2: -1.0, 3: -1.0}, 9, (), [], [1]),  # a path starts at the root
        ({1: -1.0, 3: -1.0, 4: -1.0}, 2, (), [1, 3], [6, 8]),
        ({1: -1.0, 3: -1.0, 4: -1.0}, 9, (8,), [1, 3], [6, 8]),
    ],
)
def test_the_longest_typical_path_is_kept(
    scores: dict[int, float], limit: int, terminal: Any, rows: list[int], token_ids: list[int]
) -> None:
    walker = Walker(TREE, limit=limit, terminal=terminal)
    walker.accept(scores)
    if not walker.done:
        walker.take(CHOICES[walker.node])
    assert walker.done
    assert (walker.walk.rows, walker.walk.token_ids) == (rows, token_ids)


@pytest.mark.parametrize(
    ("probabilities", "token", "accepted"),
    [
        ([0.97, 0.03], 0, True),
        ([0.97, 0.03], 1, False),  # entropy 0.13: the threshold of 0.09 counts
        ([0.05] * 20, 3, True),  # entropy 3: 0.3 * exp(-3) = 0.015
    ],
)
def test_typical_is_more_probable_than_the_entropy_lets_expect(
    probabilities: list[float], token: int, accepted: bool
) -> None:
    row = Row(Sampling(), (), [0], [])
    score = typical(torch.tensor([probabilities]).log(), [row], [token], threshold=0.09, alpha=0.3)[0]
    assert score == (pytest.approx(math.log(probabilities[token])) if accepted else None)


def test_it_is_lossy_only_when_sampling() -> None:
    lossy = {"acceptance": "typical", "posterior_threshold": 1e-4, "posterior_alpha": 0.01, "nodes": 12}
    with tiny_engine(methods=["ngram"]) as engine:
        for temperature in (0, 1):
            plain = answers(engine, requests(temperature=temperature, method="vanilla"))
            exact = answers(engine, requests(temperature=temperature, method="ngram", draft={"acceptance": "exact"}))
            steps = engine.counters.thread_steps
            ours = answers(engine, requests(temperature=temperature, method="ngram", draft=lossy))
            steps = engine.counters.thread_steps - steps
            assert exact == plain
            assert (ours == plain) == (temperature == 0)
        assert all(len(answer) == 48 for answer in ours)
        assert steps < 0.7 * sum(map(len, ours)), "nearly every drafted token is typical by these thresholds"
        events = list(engine.generate("abc", method="ngram", draft=lossy, max_new_tokens=4, temperature=1))
        assert events[0].header is not None and not events[0].header.exact
        assert events[0].header.parameters["draft"] == lossy
