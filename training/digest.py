"""Digests that tell whether something kept in a file was computed from the same model and answers."""

import hashlib
import json
from collections.abc import Sequence

from transformers import PreTrainedModel

from training.answers import Answer


def answers_digest(answers: Sequence[Answer]) -> str:
    """Of prompts and answers, in their order; 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for answer in answers:
        digest.update(json.dumps([answer.prompt, answer.answer]).encode())
    return digest.hexdigest()


def model_digest(model: PreTrainedModel) -> str:
    """Of the weights (the first few of every tensor) and their type; 64 hexadecimal digits."""
    digest = hashlib.sha256(str(model.dtype).encode())
    for parameter in model.parameters():
        digest.update(parameter.detach().flatten()[:8].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def short_digest(*parts: object) -> str:
    """For a file's name; 16 hexadecimal digits."""
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:16]
