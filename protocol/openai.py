"""OpenAI's chat and completion bodies, with polydecode's extra keys (``method``, ``trace``, ``top_k``, …)."""

import time
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from protocol.generation import ChatMessage, SamplingFields, ThreadDelta, Usage
from protocol.trace import StepTrace, TraceHeader, TraceSummary
from protocol.wire import Wire

MAX_CHOICES = 128


class StreamOptions(Wire):
    include_usage: bool = False


class _OpenAIRequest(SamplingFields):
    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), BeforeValidator(lambda v: 1 if v is None else v)] = 1
    max_tokens: Annotated[int | None, Field(gt=0)] = None
    user: str | None = None


class ChatCompletionRequest(_OpenAIRequest):
    """Body of ``/v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(gt=0)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @model_validator(mode="after")
    def _top_logprobs_needs_logprobs(self) -> "ChatCompletionRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class CompletionRequest(_OpenAIRequest):
    """Body of ``/v1/completions``; several prompts give ``n`` choices each, in order."""

    prompt: str | Annotated[list[str], Field(min_length=1)]
    echo: bool = False
    logprobs: Annotated[int | None, Field(ge=0, le=100)] = None

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens


def now() -> int:
    return int(time.time())


class _Traced(Wire):
    trace: list[StepTrace] | None = None
    threads: list[ThreadDelta] | None = None
    trace_header: TraceHeader | None = None
    trace_summary: TraceSummary | None = None


class TopLogprob(Wire):
    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob] = []


class ChatLogprobs(Wire):
    content: list[TokenLogprob] = []


class AssistantMessage(Wire):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(_Traced):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None


class ChatCompletion(Wire):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(Wire):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Wire):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatCompletionChunk(_Traced):
    """A server-sent event of a chat stream. The trace keys stand beside ``choices`` and belong to its one choice."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class TextChoice(_Traced):
    index: int
    text: str
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None


class Completion(Wire):
    """Both the whole answer and a stream's chunk, as in OpenAI's API."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class ModelCard(Wire):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "polydecode"
    methods: list[str] = []


class ModelList(Wire):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorBody(Wire):
    message: str
    type: str
    param: str | None = None
    code: int | None = None


class ErrorReply(Wire):
    error: ErrorBody
