"""A conversation as plain messages, and the request that continues it."""

from dataclasses import dataclass
from typing import Any

History = list[dict[str, str]]


@dataclass(frozen=True)
class Parameters:
    """What the page lets a user choose."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    max_tokens: int
    seed: int | None
    system: str

    @classmethod
    def read(
        cls,
        temperature: float,
        top_p: float,
        top_k: float,
        min_p: float,
        repetition_penalty: float,
        max_tokens: float,
        seed: str,
        system: str,
    ) -> "Parameters":
        """From the page's fields, in its order.

        Raises:
            ValueError: the seed is no whole number.
        """
        return cls(
            temperature, top_p, int(top_k), min_p, repetition_penalty, int(max_tokens), _seed(seed), system.strip()
        )


def _seed(text: str) -> int | None:
    try:
        return int(text) if text.strip() else None
    except ValueError:
        raise ValueError(f"the seed must be a whole number, not {text.strip()!r}") from None


def with_question(history: History, question: str) -> History:
    """The history and a new question. One that never got an answer is dropped: templates want roles to alternate."""
    return [*_answered(history), {"role": "user", "content": question}]


def with_answer(history: History, answer: str) -> History:
    """The history and the answer so far, if there is any yet."""
    return [*history, {"role": "assistant", "content": answer}] if answer else history


def without_answer(history: History) -> History:
    """The history up to its last question, to have that answered anew."""
    return history[:-1] if history and history[-1]["role"] == "assistant" else history


def _answered(history: History) -> History:
    return history[:-1] if history and history[-1]["role"] == "user" else history


def request_body(model: str | None, method: str | None, history: History, parameters: Parameters) -> dict[str, Any]:
    """The body of ``/v1/chat/completions``; without ``method`` the model's own.

    Raises:
        ValueError: there is no model to ask.
    """
    if not model:
        raise ValueError("there is no model to ask yet")
    opening = [{"role": "system", "content": parameters.system}] if parameters.system else []
    return {
        "model": model,
        "messages": [*opening, *history],
        "trace": True,
        "temperature": parameters.temperature,
        "top_p": parameters.top_p,
        "top_k": parameters.top_k,
        "min_p": parameters.min_p,
        "repetition_penalty": parameters.repetition_penalty,
        "max_tokens": parameters.max_tokens,
        **({} if parameters.seed is None else {"seed": parameters.seed}),
        **({"method": method} if method else {}),
    }
