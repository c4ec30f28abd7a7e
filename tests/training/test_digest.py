"""What was computed from one model is not taken for another's, whatever its name."""

from pathlib import Path

import numpy as np

from tests.support.tiny import tiny_checkpoint
from training.answers import Answer
from training.foreseen import foreseen_guesses
from training.hidden import hidden_states
from training.ppd import blank_tokens


def test_other_weights_of_the_same_name_are_computed_anew(learned: list[Answer], tmp_path: Path) -> None:
    one, other = tiny_checkpoint().model, tiny_checkpoint(seed=1).model
    assert one.config.name_or_path == other.config.name_or_path
    tokens = blank_tokens(one, 3, 2, "ensemble", 0)
    for number in range(2):  # the second time from the files
        states = [hidden_states(model, learned, 1, tmp_path).states for model in (one, other)]
        guesses = [foreseen_guesses(model, tokens, learned, tmp_path) for model in (one, other)]
        assert not np.array_equal(*states), number
        assert not np.array_equal(guesses[0][0].chances, guesses[1][0].chances), number
    assert len(list(tmp_path.iterdir())) == 4
