"""Ordinary decoding by transformers, and the tie rule by which answers are compared with it."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from benchmarks.verify import TIE


def greedy(model: PreTrainedModel, prompt: Sequence[int], new_tokens: int, eos: Sequence[int] = ()) -> list[int]:
    """The tokens that ``generate`` appends to ``prompt``."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=list(eos) or -1,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


def differs_only_by_a_tie(
    model: PreTrainedModel, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int]
) -> bool:
    """Whether the first difference lies between two logits within TIE in a reference forward of the same prefix.

    True is returned for a tie, False for a real difference; equal answers must not be asked about.
    """
    first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *theirs[:first]]]), use_cache=False).logits[0, -1]
    return bool((logits[ours[first]] - logits[theirs[first]]).abs() <= TIE)


def assert_same_answer(
    model: PreTrainedModel, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int]
) -> bool:
    """Assert equality under the tie rule; returns whether a tie had to be invoked."""
    if list(ours) == list(theirs):
        return False
    assert differs_only_by_a_tie(model, prompt, ours, theirs), f"ours {list(ours)}\ntheirs {list(theirs)}"
    return True
