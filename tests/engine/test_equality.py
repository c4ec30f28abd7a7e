"""Our answers equal transformers' own: greedy on every family, alone and batched; sampled by seed in any batch."""

import random
from collections.abc import Sequence
from copy import deepcopy
from queue import SimpleQueue

import pytest
import torch

from benchmarks.verify import tokens_of
from protocol.generation import GenerateParams
from tests.support.oracle import assert_same_answer, greedy
from tests.support.tiny import tiny_checkpoint, tiny_engine
from workers.engine import Engine
from workers.model.checkpoint import Checkpoint
from workers.request import Event

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "gemma2", "gpt_oss"]
LETTERS = "abcdefghij klmnopqrstuvwxyz,."


def prompts(count: int, seed: int = 0) -> list[str]:
    chooser = random.Random(seed)
    return ["".join(chooser.choices(LETTERS, k=chooser.randint(1, 60))) for _ in range(count)]


def answers(engine: Engine, requests: Sequence[dict]) -> list[list[int]]:
    """Run requests together; the token ids of each answer."""
    queues: list[SimpleQueue[Event]] = [SimpleQueue() for _ in requests]
    for request, queue in zip(requests, queues, strict=True):
        engine.submit(GenerateParams(echo=False, **request), queue.put)
    return [tokens_of(queue) for queue in queues]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_alone_and_batched(family: str) -> None:
    checkpoint = tiny_checkpoint(family)
    texts = prompts(8, seed=len(family))
    with tiny_engine(family) as engine:
        requests = [{"prompt": text, "temperature": 0, "max_new_tokens": 32} for text in texts]
        alone = [answers(engine, [request])[0] for request in requests[:2]]
        together = answers(engine, requests)
        for text, ours in [*zip(texts[:2], alone, strict=True), *zip(texts, together, strict=True)]:
            ids = engine.renderer.encode(text).token_ids
            assert_same_answer(checkpoint.model, ids, ours, greedy(checkpoint.model, ids, 32, [2]))


def sampled(count: int) -> list[dict]:
    warps = [{"temperature": 0.8}, {"top_p": 0.8}, {"top_k": 20}, {"repetition_penalty": 1.2, "min_p": 0.02}]
    return [
        {"prompt": text, "max_new_tokens": 40, "seed": index, **warps[index % len(warps)]}
        for index, text in enumerate(prompts(count, seed=7))
    ]


def test_sampled_text_is_the_same_alone_in_a_batch_and_after_preemption() -> None:
    requests = sampled(8)
    with tiny_engine() as engine:
        alone = [answers(engine, [request])[0] for request in requests]
        together = answers(engine, requests)
        assert engine.status().preemptions == 0
    # Room for all prompts but not for all answers: later requests lose their pages and read their tokens again.
    with tiny_engine(kv_tokens=352) as engine:
        preempted = answers(engine, requests)
        assert engine.status().preemptions > 0
        assert engine.status().free_pages == engine.status().total_pages
    assert together == alone
    assert preempted == alone


def test_seeds_and_choices_change_the_answer() -> None:
    request = {"prompt": "hello", "max_new_tokens": 20, "temperature": 1.5}
    variants = [{"seed": 1}, {"seed": 1}, {"seed": 2}, {"seed": 1, "choice": 1}, {}, {}]
    with tiny_engine() as engine:
        first, again, other_seed, other_choice, free, free_again = answers(engine, [request | v for v in variants])
    assert first == again
    assert len({tuple(answer) for answer in (first, other_seed, other_choice, free, free_again)}) == 5


def test_half_precision_runs_on_a_cpu() -> None:
    """Logits of 8 bits tie too often to equal ``generate`` for long; the first token must."""
    model = deepcopy(tiny_checkpoint().model).to(torch.bfloat16)
    checkpoint = Checkpoint("tiny-half", model, tiny_checkpoint().tokenizer)
    with Engine(lambda: checkpoint, kv_tokens=4096, methods=["vanilla", "lookahead"]) as engine:
        for method in engine.methods:
            request = {"prompt": "abcabcabc", "temperature": 0, "max_new_tokens": 12, "method": method}
            (ours,) = answers(engine, [request])
            ids = engine.renderer.encode("abcabcabc").token_ids
            assert len(ours) == 12
            assert_same_answer(model, ids, ours[:1], greedy(model, ids, 1, [2]))
