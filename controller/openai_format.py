"""Pieces of answers as OpenAI's chat and completion objects."""

import json
import re
from typing import Any, Protocol

from controller.pieces import Piece
from protocol.generation import Logprobs, Usage
from protocol.openai import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    Completion,
    TextChoice,
    TokenLogprob,
    TopLogprob,
    now,
)
from protocol.wire import Wire

_NO_LOGPROB = -9999.0  # OpenAI's figure for a probability of zero, which JSON cannot hold


class AnswerFormat(Protocol):
    """One of OpenAI's two layouts."""

    def chunk(self, index: int, piece: Piece, *, first: bool) -> Wire:
        """A stream's event for one piece of choice ``index``."""

    def usage_chunk(self, usage: Usage) -> Wire:
        """The event that ends a stream with ``include_usage``."""

    def whole(self, answers: list[Piece], usage: Usage) -> Wire:
        """The reply to a request that does not stream."""


class ChatFormat:
    """``/v1/chat/completions``."""

    def __init__(self, model: str, request_id: str) -> None:
        self._id = f"chatcmpl-{request_id}"
        self._created = now()
        self._model = model

    def chunk(self, index: int, piece: Piece, *, first: bool) -> Wire:
        role = "assistant" if first else None
        delta = ChatDelta(role=role, content=piece.text if piece.text or first else None)
        choice = ChatChunkChoice(
            index=index, delta=delta, logprobs=chat_logprobs(piece.logprobs), finish_reason=piece.finish_reason
        )
        return ChatCompletionChunk(
            id=self._id, created=self._created, model=self._model, choices=[choice], **_trace_of(piece)
        )

    def usage_chunk(self, usage: Usage) -> Wire:
        return ChatCompletionChunk(id=self._id, created=self._created, model=self._model, choices=[], usage=usage)

    def whole(self, answers: list[Piece], usage: Usage) -> Wire:
        choices = [
            ChatChoice(
                index=index,
                message=AssistantMessage(content=answer.text),
                logprobs=chat_logprobs(answer.logprobs),
                finish_reason=answer.finish_reason,
                **_trace_of(answer),
            )
            for index, answer in enumerate(answers)
        ]
        return ChatCompletion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)


class TextFormat:
    """``/v1/completions``, whose chunks and whole answers look alike."""

    def __init__(self, model: str, request_id: str) -> None:
        self._id = f"cmpl-{request_id}"
        self._created = now()
        self._model = model

    def chunk(self, index: int, piece: Piece, *, first: bool) -> Wire:
        return self._completion([self._choice(index, piece)], None)

    def usage_chunk(self, usage: Usage) -> Wire:
        return self._completion([], usage)

    def whole(self, answers: list[Piece], usage: Usage) -> Wire:
        return self._completion([self._choice(index, answer) for index, answer in enumerate(answers)], usage)

    def _completion(self, choices: list[TextChoice], usage: Usage | None) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def _choice(self, index: int, piece: Piece) -> TextChoice:
        logprobs = None if piece.logprobs is None else piece.logprobs.model_dump()
        return TextChoice(
            index=index, text=piece.text, logprobs=logprobs, finish_reason=piece.finish_reason, **_trace_of(piece)
        )


def _trace_of(piece: Piece) -> dict[str, Any]:
    return {
        "trace": piece.trace,
        "threads": piece.threads,
        "trace_header": piece.trace_header,
        "trace_summary": piece.trace_summary,
    }


def chat_logprobs(logprobs: Logprobs | None) -> ChatLogprobs | None:
    """The chat layout of completion log-probabilities."""
    if logprobs is None:
        return None
    tops = logprobs.top_logprobs + [None] * (len(logprobs.tokens) - len(logprobs.top_logprobs))
    return ChatLogprobs(
        content=[
            TokenLogprob(
                token=token,
                logprob=_number(logprob),
                bytes=_bytes(token),
                top_logprobs=[
                    TopLogprob(token=other, logprob=_number(value), bytes=_bytes(other))
                    for other, value in (top or {}).items()
                ],
            )
            for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, tops, strict=False)
        ]
    )


def _bytes(token: str) -> list[int]:
    """A token's bytes; part of a character arrives as ``bytes:\\xf0\\x9f``."""
    escaped = re.fullmatch(r"bytes:((?:\\x[0-9a-f]{2})+)", token)
    return list(bytes.fromhex(escaped[1].replace("\\x", "")) if escaped else token.encode())


def _number(logprob: float | None) -> float:
    return _NO_LOGPROB if logprob is None else logprob


def to_json(message: Wire) -> dict[str, Any]:
    """Without the keys that are None, but with the ``finish_reason`` that clients expect in every choice."""
    content = message.model_dump(mode="json", exclude_none=True)
    for choice in content["choices"]:
        choice.setdefault("finish_reason", None)
    return content


def event(content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
