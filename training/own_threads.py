"""What a model that forks has said itself, as what it is to learn: up to where it begins to repeat itself.

A small model loops where it does not read what it said: in the titles of a list above all, since the first thread sees
no item. Where a title comes back the list ends, and so the model learns to end it. The loop itself is kept:
that it should have ended there too is learned as well, since a model that is once in a loop stays in it.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from training.answers import Answer
from training.apar_data import Sample, before_repetition, heading_of, is_repetitive, whole_sentences
from training.structure import FEWEST, LEAST_DETAIL, Structured


def own_tree(index: str, prompt: str, threads: Sequence[Answer], tokenizer: Any) -> Sample | None:
    """The tree of an answer's threads, the first one first; None if too little is left of it."""
    root, *others = threads
    path = [*root.prompt, *root.answer]
    children = [child for child in others if child.prompt[:-1] == path[: len(child.prompt) - 1]]
    forks = [len(child.prompt) - 1 - len(root.prompt) for child in children]  # behind [Fork]
    unsaid = {tokenizer.eos_token_id, *(root.answer[fork - 1] for fork in forks)}

    def text(tokens: Sequence[int]) -> str:
        said: str = tokenizer.decode([token for token in tokens if token not in unsaid])
        return said

    def whole(tokens: Sequence[int]) -> str:
        detail = before_repetition(text(tokens))
        return detail if tokens[-1:] == [tokenizer.eos_token_id] else whole_sentences(detail)

    said = Structured(
        tuple(text(root.answer[start:end]) for start, end in pairwise([0, *forks, len(root.answer)])),
        tuple(whole(child.answer) for child in children),
        cut=root.answer[-1] != tokenizer.eos_token_id,
    )
    fresh = _before_a_title_comes_back(said)
    return Sample(index, prompt, fresh) if fresh.details and not is_repetitive(fresh) else None


def _before_a_title_comes_back(answer: Structured) -> Structured:
    """Also before the first item of which next to nothing was said. What is too short for a list has no end there."""
    titles: set[str] = set()
    for place, (piece, detail) in enumerate(zip(answer.pieces, answer.details, strict=False)):
        title = heading_of(piece)
        if title in titles or len(detail) < LEAST_DETAIL:
            loop = answer.pieces[place:-1] if title in titles else ()
            pieces, details = (*answer.pieces[:place], ""), answer.details[:place]
            return replace(answer, pieces=pieces, details=details, cut=place < FEWEST, loop=loop)
        titles.add(title)
    return answer
