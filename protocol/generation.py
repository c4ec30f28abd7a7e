"""A generation request as a worker takes it, and the NUL-terminated frames in which it answers.

The body is FastChat's ``/worker_generate_stream`` (same names, same defaults) with more keys; the frames are FastChat's
with more keys. FastChat's own clients and workers ignore what they do not know.
"""

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BeforeValidator, Field, field_validator, model_validator

from protocol.errors import ErrorCode, RequestError
from protocol.reading_order import Whitespace
from protocol.trace import StepTrace, TraceHeader, TraceSummary
from protocol.wire import Wire, parse_object

FinishReason = Literal["stop", "length"]
TraceLevel = bool | Literal["full"]


class ChatMessage(Wire):
    """One turn. Content is text, or OpenAI's list of parts of which only text is understood."""

    role: str
    content: str = ""

    @field_validator("content", mode="before")
    @classmethod
    def _join_text_parts(cls, content: Any) -> Any:
        if content is None:
            return ""
        if isinstance(content, list):
            return "".join(_text_of(part) for part in content)
        return content


def _text_of(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text":
        return str(part.get("text", ""))
    raise ValueError("only text content is supported")


def _as_list(value: Any) -> Any:
    return [] if value is None else value if isinstance(value, list) else [value]


def _default_for_null(default: Any) -> BeforeValidator:
    return BeforeValidator(lambda value: default if value is None else value)


Number = Annotated[float, Field(allow_inf_nan=False)]


class DraftSettings(Wire):
    """How to draft, and what of it to accept; None leaves it to the server, sizes then to the tuner.

    ``window``, ``level`` and ``guesses`` are lookahead's W, N and G, also under the names of the original.
    ``acceptance``: "exact" (the default) emits what ordinary decoding would have emitted. "typical" (Medusa's) is lossy
    when sampling: it accepts every drafted token whose probability exceeds the lesser of ``posterior_threshold`` and
    ``posterior_alpha`` · exp(-entropy).
    """

    nodes: Annotated[int | None, Field(ge=1, le=256)] = None  # rows a step: candidates, and ppd's prompt rows
    window: Annotated[int | None, Field(ge=1, validation_alias=AliasChoices("window", "WINDOW_SIZE"))] = None
    level: Annotated[int | None, Field(ge=3, validation_alias=AliasChoices("level", "LEVEL"))] = None
    guesses: Annotated[int | None, Field(ge=1, validation_alias=AliasChoices("guesses", "GUESS_SET_SIZE"))] = None
    pool_from_prompt: Annotated[
        bool | None, Field(validation_alias=AliasChoices("pool_from_prompt", "POOL_FROM_PROMPT"))
    ] = None

    tree: str | None = None  # medusa, ppd: a tree by name, instead of what is worth most in each step
    shared_pool: bool | None = None  # lookahead: read and feed the n-grams of all requests that do
    acceptance: Literal["exact", "typical"] | None = None
    posterior_threshold: Annotated[Number | None, Field(gt=0, le=1)] = None
    posterior_alpha: Annotated[Number | None, Field(gt=0, le=1)] = None

    def over(self, defaults: "DraftSettings") -> "DraftSettings":
        """These settings, and ``defaults`` where they are None."""
        return defaults.model_copy(update=self.model_dump(exclude_none=True))


class SamplingFields(Wire):
    """The sampling parameters that every door shares; ``null`` means the default."""

    temperature: Annotated[Number, Field(ge=0, le=100), _default_for_null(1.0)] = 1.0
    top_p: Annotated[Number, Field(ge=0, le=1), _default_for_null(1.0)] = 1.0
    top_k: Annotated[int, Field(ge=-1), _default_for_null(-1)] = -1  # -1 and 0: off
    min_p: Annotated[Number, Field(ge=0, le=1), _default_for_null(0.0)] = 0.0
    repetition_penalty: Annotated[Number, Field(gt=0, le=100), _default_for_null(1.0)] = 1.0
    presence_penalty: Annotated[Number, Field(ge=-2, le=2), _default_for_null(0.0)] = 0.0
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2), _default_for_null(0.0)] = 0.0
    logit_bias: Annotated[dict[int, Annotated[Number, Field(ge=-100, le=100)]], _default_for_null({})] = {}
    seed: int | None = None
    stop: Annotated[list[str], BeforeValidator(_as_list)] = []
    stop_token_ids: Annotated[list[int], BeforeValidator(_as_list)] = []
    method: str | None = None  # None: the default of the model name
    draft: Annotated[DraftSettings, _default_for_null(DraftSettings())] = DraftSettings()
    trace: Annotated[TraceLevel, _default_for_null(False)] = False
    max_length: Annotated[int | None, Field(gt=0)] = None  # prompt and answer together
    max_threads: Annotated[int | None, Field(gt=0)] = None  # APAR: threads that run at a time; others wait
    max_depth: Annotated[int | None, Field(gt=0)] = None  # APAR: of a thread; the first one's is 1, and 1 forbids forks
    max_children: Annotated[int | None, Field(ge=0)] = None  # APAR: of a thread
    max_total_tokens: Annotated[int | None, Field(gt=0)] = None  # of all threads together: a safety stop
    whitespace: Whitespace | None = None  # APAR: between the texts of threads; None: as the model learned it

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: list[str]) -> list[str]:
        return [text for text in stop if text]


class GenerateParams(SamplingFields):
    """Body of ``/worker_generate_stream``: ``prompt`` or ``messages``, and how to decode."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    max_new_tokens: Annotated[int | None, Field(gt=0)] = None  # None: 256, or what the context still holds
    echo: Annotated[bool, _default_for_null(True)] = True  # FastChat's default
    logprobs: Annotated[int | None, Field(ge=0, le=100)] = None  # alternatives per token
    choice: Annotated[int, Field(ge=0)] = 0  # which of OpenAI's n answers: part of the key of every draw
    max_live_threads: Annotated[int | None, Field(gt=0)] = None  # APAR's own rule: no fork while so many are alive
    text_deltas: bool = False  # frames carry only new text; FastChat's carry all of it every time

    @model_validator(mode="after")
    def _one_source(self) -> "GenerateParams":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.messages is not None and not self.messages:
            raise ValueError("messages must not be empty")
        return self


class Usage(Wire):
    """Token counts; ``completion_tokens`` counts what the model chose, EOS included."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class Logprobs(Wire):
    """OpenAI completions' layout. Natural logarithms of the model's own distribution, before any warping."""

    text_offset: list[int] = []
    token_logprobs: list[float | None] = []
    tokens: list[str] = []
    top_logprobs: list[dict[str, float | None] | None] = []

    def extend(self, other: "Logprobs") -> None:
        self.text_offset += other.text_offset
        self.token_logprobs += other.token_logprobs
        self.tokens += other.tokens
        self.top_logprobs += other.top_logprobs


class ThreadDelta(Wire):
    """New text of one thread since the frame before."""

    thread: int
    parent: int | None = None
    text: str = ""
    token_ids: list[int] = []
    token_logprobs: list[float] | None = None  # where the request asks for logprobs
    finish_reason: str | None = None

    def extend(self, later: "ThreadDelta") -> None:
        """Append what the same thread said later."""
        self.text += later.text
        self.token_ids = self.token_ids + later.token_ids
        if later.token_logprobs is not None:
            self.token_logprobs = (self.token_logprobs or []) + later.token_logprobs
        self.finish_reason = later.finish_reason or self.finish_reason


def joined(deltas: Iterable[ThreadDelta]) -> list[ThreadDelta]:
    """One entry a thread, in order of appearance."""
    threads: dict[int, ThreadDelta] = {}
    for delta in deltas:
        if delta.thread in threads:
            threads[delta.thread].extend(delta)
        else:
            threads[delta.thread] = delta.model_copy()
    return list(threads.values())


def thread_deltas(steps: Iterable[StepTrace]) -> list[ThreadDelta]:
    """What the steps added to each thread."""
    return joined(
        ThreadDelta(
            thread=thread.thread,
            parent=thread.parent,
            text=thread.text,
            token_ids=thread.token_ids,
            token_logprobs=thread.token_logprobs,
            finish_reason=thread.finish_reason,
        )
        for step in steps
        for thread in step.threads
    )


class StreamFrame(Wire):
    """One frame of an answer. ``text`` is all of it so far, or the new part where ``text_deltas`` was asked for."""

    text: str
    error_code: int = 0
    usage: Usage | None = None
    finish_reason: FinishReason | None = None
    logprobs: Logprobs | None = None
    cumulative: bool = True
    trace: list[StepTrace] | None = None
    threads: list[ThreadDelta] | None = None
    trace_header: TraceHeader | None = None  # in the first frame of a traced request
    trace_summary: TraceSummary | None = None  # in its last

    def encode(self) -> bytes:
        """FastChat's framing: ASCII-escaped JSON and a NUL, which therefore never occurs inside a frame."""
        content = self.model_dump(mode="json", exclude_none=True)
        content.setdefault("finish_reason", None)
        return json.dumps(content).encode() + b"\0"


def error_frame(error: RequestError) -> StreamFrame:
    """The in-band error of a FastChat stream (the HTTP status stays 200)."""
    return StreamFrame(text=error.message, error_code=int(error.code))


def parse_frame(frame: bytes) -> StreamFrame:
    """Parse one frame without its NUL; RequestError INTERNAL_ERROR if it is malformed."""
    try:
        content = json.loads(frame)
    except ValueError:
        raise RequestError(ErrorCode.INTERNAL_ERROR, "the worker sent a malformed frame") from None
    return parse_object(StreamFrame, content)
