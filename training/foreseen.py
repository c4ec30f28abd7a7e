"""What prompt tokens guess at every place of known answers, computed once and kept in a file: for replays."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from training.answers import Answer
from training.digest import answers_digest, model_digest, short_digest
from training.prompt_rows import prompt_states, read_texts
from workers.decoding.ppd import WIDTH
from workers.decoding.prompt_tokens import PromptTokens
from workers.model.quantization import output_projection

TOGETHER = 64  # places of a forward pass


@dataclass(frozen=True)
class ForeseenGuesses:
    """Of n places: int64[n, S, WIDTH] tokens, most probable first, and float32[n, S, WIDTH] their probabilities."""

    tokens: np.ndarray
    chances: np.ndarray


def foreseen_guesses(
    model: PreTrainedModel, tokens: PromptTokens, answers: Sequence[Answer], folder: Path
) -> list[ForeseenGuesses]:
    """For each answer the guesses behind the places that chose its tokens; from ``folder`` if they are known."""
    path = folder / f"foreseen-{_digest(model, tokens, answers)}.npz"
    if not path.is_file():
        found = [_guesses(model, tokens, answer) for answer in answers]
        folder.mkdir(parents=True, exist_ok=True)
        ids = np.concatenate([one.tokens for one in found])
        np.savez(path, tokens=ids, chances=np.concatenate([one.chances for one in found]))
    ends = np.cumsum([len(answer.answer) for answer in answers])[:-1]
    with np.load(path) as kept:
        parts = np.split(kept["tokens"], ends), np.split(kept["chances"], ends)
    return [ForeseenGuesses(*pair) for pair in zip(*parts, strict=True)]


@torch.inference_mode()
def _guesses(model: PreTrainedModel, tokens: PromptTokens, answer: Answer) -> ForeseenGuesses:
    text = read_texts(model, [answer.prompt + answer.answer])
    places = torch.arange(len(answer.answer), device=model.device) + len(answer.prompt) - 1
    states = torch.cat([prompt_states(model, tokens, text, part[None])[0] for part in places.split(TOGETHER)])
    best = (states @ output_projection(model).T).float().softmax(-1).topk(WIDTH)
    return ForeseenGuesses(best.indices.cpu().numpy(), best.values.cpu().numpy())


def _digest(model: PreTrainedModel, tokens: PromptTokens, answers: Sequence[Answer]) -> str:
    embeddings = tokens.embeddings.detach().float().cpu().numpy().tobytes().hex()
    return short_digest(model_digest(model), tokens.attention, embeddings, answers_digest(answers))
