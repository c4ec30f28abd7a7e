"""PPD's published training data: conversations cut at a random place, and how the model itself would go on.

One cut a conversation, in its last answer; the model's next S + 1 greedy tokens are what the S prompt tokens learn to
foresee (the paper's distillation set), or the conversation's own (its truncated data set). The published sets hold the
teacher's logits, gigabytes of them; the trainer here computes them in the pass in which the prompt tokens learn.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from protocol.generation import ChatMessage
from training.answers import Answer
from training.kept import Kept
from training.prompts import Benchmarks
from workers.decoding.registry import BASELINE
from workers.model.checkpoint import Checkpoint
from workers.prompts import PromptRenderer

logger = logging.getLogger(__name__)

LONGEST = 2048  # tokens of a cut conversation, as published
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def cut_conversations(
    path: Path, checkpoint: Checkpoint, benchmarks: Benchmarks, *, special: int, own: bool, seed: int, cache: Path
) -> list[Answer]:
    """Prompts that end inside an answer, each with the S + 1 tokens that follow.

    Args:
        path: JSON or JSONL of conversations: ``conversations`` [{from, value}] or ``messages`` [{role, content}].
        special: S.
        own: whether the model goes on with its own words, instead of the conversation's.
        cache: JSONL file where the model's own words are kept.

    Raises:
        ValueError: a line is no conversation.
    """
    renderer = PromptRenderer(checkpoint.tokenizer, checkpoint.name)
    draws = np.random.default_rng(seed)
    kept = Kept(cache, Answer)
    found: list[Answer] = []
    for entry in read_entries(path):
        messages = messages_of(entry, path)
        if any(benchmarks.holds(message.content) for message in messages if message.role == "user"):
            continue
        cut = _cut(messages, renderer, special + 1, draws)
        if cut is None:
            continue
        prompt, following = cut
        found.append(
            _own_words(checkpoint, prompt, special + 1, kept)
            if own
            else Answer(checkpoint.name, special + 1, prompt, following, "")
        )
        if len(found) % 100 == 0:
            logger.info("%d conversations cut", len(found))
    return found


def read_entries(path: Path) -> list[Any]:
    """What a JSON list holds, or a file of a JSON value a line."""
    text = path.read_text("utf-8")
    entries: list[Any] = (
        json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.split("\n") if line]
    )
    return entries


def messages_of(entry: Any, path: Path) -> list[ChatMessage]:
    """The turns of a chat: ``conversations`` [{from, value}] or ``messages`` [{role, content}]. Raises ValueError."""
    try:
        turns = entry["conversations"] if "conversations" in entry else entry["messages"]
        named = [(turn["from"], turn["value"]) if "from" in turn else (turn["role"], turn["content"]) for turn in turns]
        return [ChatMessage(role=ROLES[role], content=content) for role, content in named]
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{path}: no conversation: {str(entry)[:80]}") from None


def _cut(
    messages: Sequence[ChatMessage], renderer: PromptRenderer, left: int, draws: np.random.Generator
) -> tuple[list[int], list[int]] | None:
    """The tokens up to a random place in the last answer that is long enough, and ``left`` tokens behind it."""
    for last in range(len(messages) - 1, 0, -1):
        if messages[last].role != "assistant":
            continue
        answer = renderer.encode(messages[last].content).token_ids
        prompt = renderer.render(messages[:last]).token_ids
        if len(answer) >= left and len(prompt) + left <= LONGEST:
            place = int(draws.integers(0, min(len(answer), LONGEST - len(prompt)) - left + 1))
            return prompt + answer[:place], answer[place : place + left]
    return None


def _own_words(checkpoint: Checkpoint, prompt: list[int], count: int, kept: Kept[Answer]) -> Answer:
    if known := kept.found.get((checkpoint.name, BASELINE, count, tuple(prompt))):
        return known
    ids = torch.tensor([prompt], device=checkpoint.model.device)
    model: Any = checkpoint.model
    words = model.generate(
        ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, attention_mask=torch.ones_like(ids)
    )
    answer = Answer(checkpoint.name, count, prompt, words[0, len(prompt) :].tolist(), "")
    kept.add(answer)
    return answer
