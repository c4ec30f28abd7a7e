"""``model.generate(custom_generate=...)``: the answers of ``generate``, on a model that is as it was afterwards."""

from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from polydecode import custom_generate
from tests.support.families import FAMILIES, tiny_model
from workers.decoding.registry import UnknownMethod

METHODS = ["vanilla", "ngram", "lookahead", "lookahead+ngram"]
PROMPT = [65, 66, 67] * 4
PADDED = {
    "input_ids": torch.tensor([[0] * 5 + PROMPT[:7], PROMPT]),
    "attention_mask": torch.tensor([[0] * 5 + [1] * 7, [1] * 12]),
}


def generate(model: Any, **options: Any) -> Any:
    inputs = {"input_ids": torch.tensor([PROMPT]), "max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    return model.generate(**{**inputs, **options})


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_generate(family: str) -> None:
    model = tiny_model(family, 0)
    for method in METHODS:
        assert torch.equal(generate(model, custom_generate=custom_generate(method)), generate(model))


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_as_it_was_afterwards(method: str) -> None:
    model = tiny_model("llama", 0)
    before = (model.config._attn_implementation, {type(module) for module in model.modules()}, model.training)
    logits = model(torch.tensor([PROMPT])).logits
    generate(model, custom_generate=custom_generate(method))
    assert (model.config._attn_implementation, {type(module) for module in model.modules()}, model.training) == before
    assert torch.equal(model(torch.tensor([PROMPT])).logits, logits)


@pytest.mark.parametrize("method", METHODS)
def test_padded_rows_are_answered_like_generate_answers_them(method: str) -> None:
    model = tiny_model("llama", 0)
    options: dict[str, Any] = {**PADDED, "repetition_penalty": 1.3, "eos_token_id": [70, 71]}
    assert torch.equal(generate(model, custom_generate=custom_generate(method), **options), generate(model, **options))


def test_sampled_answers_repeat_with_the_seed_and_do_not_depend_on_the_method() -> None:
    model = tiny_model("llama", 0)
    sampled = []
    for method in [*METHODS, "vanilla"]:
        torch.manual_seed(7)
        sampled.append(generate(model, custom_generate=custom_generate(method), do_sample=True, top_k=20).tolist())
    assert all(answer == sampled[0] for answer in sampled)


def test_processors_criteria_and_streamers_work() -> None:
    class Only(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores = scores.clone()
            scores[:, 100:] = -torch.inf
            return scores

    class Seven(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
            return torch.tensor([input_ids.shape[1] >= len(PROMPT) + 7] * len(input_ids))

    class Streamer:
        def __init__(self) -> None:
            self.got: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.got += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    model, streamer = tiny_model("llama", 0), Streamer()
    options = {
        "logits_processor": LogitsProcessorList([Only()]),
        "stopping_criteria": StoppingCriteriaList([Seven()]),
        "return_dict_in_generate": True,
    }
    ours = generate(model, custom_generate=custom_generate("ngram", nodes=9, streamer=streamer), **options).sequences
    assert torch.equal(ours, generate(model, **options).sequences)
    assert ours.shape[1] == len(PROMPT) + 7
    assert streamer.ended
    assert streamer.got == ours[0].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams must be 1"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"input_ids": torch.zeros((1, 0), dtype=torch.int64)}, "another kind of input"),
    ],
)
def test_what_it_cannot_do_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        generate(tiny_model("llama", 0), custom_generate=custom_generate("ngram"), **options)
    assert "\n" not in str(caught.value)


def test_unknown_methods_and_sizes_are_refused_at_once() -> None:
    with pytest.raises(UnknownMethod, match="known: "):
        custom_generate("medusae")
    with pytest.raises(ValueError, match="level"):
        custom_generate("lookahead", level=2)
    with pytest.raises(ValueError, match="generate decodes one thread"):
        custom_generate("apar+ngram")
