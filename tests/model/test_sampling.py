"""Sampling: warping as transformers warps, draws that follow the distribution, and keys that decide alone."""

import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.model.sampling import Row, Sampling, adjusted, choose, top_logprobs, uniform, warped

VOCABULARY = 40
DRAWS = 20_000


def logits_of(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def row(sampling: Sampling, position: int = 3) -> Row:
    return Row(sampling, (), list(range(position)), ())


@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.2, 3),
    top_k=st.sampled_from([0, 1, 5, 39, 40, 100]),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
)
@settings(max_examples=150, deadline=None)
def test_warping_equals_transformers(seed: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = logits_of(seed)
    processors = [tf.TemperatureLogitsWarper(temperature)]
    processors += [tf.TopKLogitsWarper(min(top_k, VOCABULARY))] if top_k else []
    processors += [tf.TopPLogitsWarper(top_p)] if top_p < 1 else []
    processors += [tf.MinPLogitsWarper(min_p)] if min_p else []
    expected = logits
    for processor in processors:
        expected = processor(torch.zeros(1, 1, dtype=torch.int64), expected)
    ours = warped(logits, [Sampling(temperature, top_p, top_k, min_p)])
    assert torch.allclose(ours / ours.sum(), expected.softmax(-1), atol=1e-5)


def test_each_row_is_warped_by_its_own_sampling() -> None:
    samplings = [Sampling(0.5, top_p=0.7), Sampling(2.0, top_k=3), Sampling(1.0, min_p=0.2), Sampling(1.0)]
    logits = logits_of(0, len(samplings))
    together = warped(logits, samplings)
    for index, sampling in enumerate(samplings):
        assert torch.allclose(together[index], warped(logits[index : index + 1], [sampling])[0], atol=1e-7)


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """The statistic over the cells that can occur, less its degrees of freedom, in standard deviations."""
    possible = probabilities > 0
    assert not counts[~possible].any()
    expected = probabilities[possible] * counts.sum()
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = possible.sum() - 1
    return float((statistic - freedom) / np.sqrt(2 * freedom))


SAMPLINGS = [Sampling(1.0), Sampling(0.7, top_p=0.8), Sampling(1.5, top_k=7), Sampling(1.0, min_p=0.1)]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_draws_follow_the_warped_distribution(sampling: Sampling) -> None:
    logits = logits_of(1)
    probabilities = warped(logits, [sampling])[0]
    probabilities /= probabilities.sum()
    ours = draws(logits, sampling)
    reference = torch.multinomial(probabilities, DRAWS, True, generator=torch.Generator().manual_seed(3))
    for counted in (ours, reference):
        counts = np.bincount(counted, minlength=VOCABULARY)
        assert abs(chi_square(counts, probabilities.double().numpy())) < 4


def test_the_chi_square_test_notices_a_wrong_draw() -> None:
    """Draws at a slightly wrong temperature fail the test that the right ones pass."""
    logits = logits_of(1)
    right = warped(logits, [Sampling(1.0)])[0].double().numpy()
    counts = np.bincount(draws(logits, Sampling(1.05)), minlength=VOCABULARY)
    assert chi_square(counts, right) > 4


def draws(logits: torch.Tensor, sampling: Sampling) -> np.ndarray:
    rows = [Row(sampling, (), range(position), ()) for position in range(DRAWS)]
    return np.asarray(choose(logits.expand(DRAWS, -1), rows))


@given(st.integers(), st.integers(0, 100), st.lists(st.integers(0, 30), max_size=3), st.integers(0, 100_000))
def test_uniform_numbers_depend_on_every_part_of_the_key(seed: int, choice: int, path: list[int], place: int) -> None:
    number = uniform(seed, choice, path, place)
    assert 0 <= number < 1
    assert number == uniform(seed, choice, path, place)
    others = [
        uniform(seed + 1, choice, path, place),
        uniform(seed, choice + 1, path, place),
        uniform(seed, choice, [*path, 0], place),
        uniform(seed, choice, path, place + 1),
    ]
    assert number not in others


def test_a_draw_ignores_the_rest_of_the_batch() -> None:
    logits = logits_of(5, 8)
    rows = [row(Sampling(1.0 + index / 10, top_p=0.9, seed=index), 5 + index) for index in range(8)]
    together = choose(logits, rows)
    assert together == [choose(logits[i : i + 1], rows[i : i + 1])[0] for i in range(8)]


def test_penalties_equal_transformers_and_openai() -> None:
    logits, prompt, answer = logits_of(2), [1, 2, 2], [3, 3, 4]
    repeated = tf.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + answer]), logits.clone())
    ours = adjusted(logits, [Row(Sampling(repetition_penalty=1.3), (), prompt, answer)])
    assert torch.allclose(ours, repeated)
    expected = logits.clone()
    expected[0, 3] -= 0.5 + 2 * 0.25
    expected[0, 4] -= 0.5 + 0.25
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    assert torch.allclose(adjusted(logits, [Row(sampling, (), prompt, answer)]), expected)


def test_drafted_tokens_count_for_penalties_at_their_node() -> None:
    logits, sampling = logits_of(2), Sampling(frequency_penalty=1.0, repetition_penalty=1.2)
    drafted = adjusted(logits, [Row(sampling, (), [1], [2], [3, 3])])
    committed = adjusted(logits, [Row(sampling, (), [1], [2, 3, 3])])
    assert torch.equal(drafted, committed)


def test_bias_and_bans() -> None:
    logits = torch.zeros(1, VOCABULARY)
    biased = Sampling(0.0, logit_bias={7: 5.0})
    assert choose(logits, [row(biased)]) == [7]
    banned = Sampling(0.0, logit_bias={7: 5.0, 8: 4.0}, banned=(7,))
    assert choose(logits, [row(banned)]) == [8]
    after = Sampling(0.0, logit_bias={7: 5.0, 8: 4.0}, banned_after={9: (7,)})
    assert choose(logits, [Row(after, (), [9], ())]) == [8]
    assert choose(logits, [Row(after, (), [9], (), [1])]) == [7]


def test_tiny_temperature_and_top_p_are_greedy() -> None:
    logits = logits_of(9)
    best = int(logits.argmax())
    assert choose(logits, [row(Sampling(0.0))]) == choose(logits, [row(Sampling(1.0, top_p=0.0))]) == [best]


def test_top_logprobs_are_of_the_models_own_distribution() -> None:
    logits = logits_of(4, 2)
    scored = top_logprobs(logits, [3, 5], 2)
    expected = logits.log_softmax(-1)
    assert scored[0].logprob == pytest.approx(expected[0, 3].item())
    assert [token for token, _ in scored[1].top] == expected[1].topk(2).indices.tolist()
    assert top_logprobs(logits, [3, 5], 0)[0].top == []
