"""Last hidden states of answered prompts, computed once and kept in a file: heads are trained from there."""

import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from transformers import PreTrainedModel

from training.answers import Answer
from training.digest import answers_digest, model_digest, short_digest
from training.precision import fast_products, has_fast_bfloat16

logger = logging.getLogger(__name__)

ROWS = 1024  # most tokens of a forward pass
REPORT_S = 10.0


@dataclass(frozen=True)
class HiddenStates:
    """N places of some answers: the states from which their tokens were chosen.

    Attributes:
        states: float16[N, h]; state i chose a token of an answer.
        chosen: int32[N], that token.
        following: int32[N, ahead], its successors in the answer; -1 behind its end.
        answer: int32[N], the number of the answer.
    """

    states: np.ndarray
    chosen: np.ndarray
    following: np.ndarray
    answer: np.ndarray


def hidden_states(
    model: PreTrainedModel, answers: Sequence[Answer], ahead: int, folder: Path, *, fast: bool = False
) -> HiddenStates:
    """States of all ``answers``, from ``folder`` if they were computed before.

    Args:
        ahead: how many successors of every token are wanted.
        fast: multiply in bfloat16 where that pays; good enough to learn from, not to tell what a step would draft.
    """
    fast = fast and has_fast_bfloat16(model.device)
    sizes = [len(answer.answer) for answer in answers]
    chosen = np.concatenate([np.array(answer.answer, dtype=np.int32) for answer in answers])
    following = np.concatenate([_following(answer.answer, ahead) for answer in answers])
    numbers = np.repeat(np.arange(len(answers), dtype=np.int32), sizes)
    path = folder / f"hidden-{short_digest(model_digest(model), answers_digest(answers), fast)}.npy"
    if not path.is_file():
        _compute(model, answers, sum(sizes), path, fast)
    return HiddenStates(np.load(path, mmap_mode="r"), chosen, following, numbers)


def _compute(model: PreTrainedModel, answers: Sequence[Answer], places: int, path: Path, fast: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")  # two trainings may compute the same states
    shape = (places, model.config.get_text_config().hidden_size)
    states = np.lib.format.open_memmap(scratch, mode="w+", dtype=np.float16, shape=shape)
    decoder = model.get_decoder()
    # Answers of like length share a forward pass: the right end of the shorter ones is computed for nothing.
    order = sorted(range(len(answers)), key=lambda number: len(answers[number].prompt) + len(answers[number].answer))
    starts = np.cumsum([0, *(len(answer.answer) for answer in answers)])
    started = reported = perf_counter()
    done = 0
    while done < len(order):
        group = _group(answers, order[done:])
        paths = [answers[number].prompt + answers[number].answer for number in group]
        ids = torch.zeros(len(group), max(map(len, paths)), dtype=torch.int64, device=model.device)
        for row, tokens in enumerate(paths):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        with torch.inference_mode(), fast_products(model.device) if fast else nullcontext():
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state.to("cpu", torch.float16).numpy()
        for row, number in enumerate(group):
            first, size = len(answers[number].prompt) - 1, len(answers[number].answer)
            states[starts[number] : starts[number] + size] = hidden[row, first : first + size]
        done += len(group)
        if perf_counter() - reported > REPORT_S or done == len(order):
            reported = perf_counter()
            ahead = (reported - started) / done * (len(order) - done)
            logger.info("hidden states of %d of %d answers, %.1f minutes to go", done, len(order), ahead / 60)
    states.flush()
    del states
    scratch.replace(path)


def _group(answers: Sequence[Answer], order: Sequence[int]) -> list[int]:
    """The next answers that fit into a forward pass together."""
    group: list[int] = []
    for number in order:
        length = len(answers[number].prompt) + len(answers[number].answer)
        if group and (len(group) + 1) * length > ROWS:
            break
        group.append(number)
    return group


def _following(answer: Sequence[int], ahead: int) -> np.ndarray:
    """int32[n, ahead]: behind each of the n tokens."""
    padded = np.array([*answer, *[-1] * ahead], dtype=np.int32)
    places = np.arange(len(answer))[:, None] + np.arange(1, 1 + ahead)
    following: np.ndarray = padded[places]
    return following
