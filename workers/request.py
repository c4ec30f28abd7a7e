"""A request being answered, and its generation threads."""

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from protocol.errors import RequestError
from protocol.generation import DraftSettings, FinishReason, TraceLevel
from protocol.trace import StepTrace, ThreadStep, TraceHeader, TraceSummary, summarise
from workers.model.pages import PageTable
from workers.model.sampling import Sampling, TokenLogprobs
from workers.pace import Pace
from workers.text import Detokenizer, StopScanner

DEFAULT_MAX_THREADS = 32


@dataclass(frozen=True)
class GenerationRequest:
    """What is to be generated, checked and in tokens.

    Attributes:
        prompt: P ≥ 1 token ids.
        echo: text to put before the answer ("" for none).
        max_new_tokens: most tokens that a path may add to the prompt.
        stop_token_ids: EOS and the request's own.
        logprobs: alternatives to report per token; None reports nothing.
        stop_when: ends a path whose tokens it is true for.
        max_threads: threads of this request that may run at the same time; further ones wait.
    """

    request_id: str
    prompt: list[int]
    sampling: Sampling
    max_new_tokens: int
    method: str
    stop_token_ids: frozenset[int]
    stop_strings: tuple[str, ...] = ()
    echo: str = ""
    logprobs: int | None = None
    trace: TraceLevel = False
    draft: DraftSettings = field(default_factory=DraftSettings)
    stop_when: Callable[[list[int]], bool] | None = None
    max_threads: int = DEFAULT_MAX_THREADS

    @property
    def is_exact(self) -> bool:
        """Whether the answer is the one of ordinary decoding; at temperature 0 typical acceptance is exact as well."""
        return self.draft.acceptance != "typical" or self.sampling.greedy

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.logprobs is not None and bool(self.echo)


@dataclass(frozen=True)
class TokenReport:
    """A token with its logprobs, for requests that asked; ``logprobs`` is None for the prompt's first token."""

    token: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True)
class Event:
    """What one step, or the end, means to whoever waits for a request.

    ``text`` is new text in reading order. ``header`` comes with the first event, ``summary`` and ``finish_reason`` (or
    ``error``) with the last one.
    """

    text: str = ""
    step: StepTrace | None = None
    tokens: tuple[TokenReport, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    header: TraceHeader | None = None
    summary: TraceSummary | None = None
    finish_reason: FinishReason | None = None
    error: RequestError | None = None

    @property
    def last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


Sink = Callable[[Event], None]


class Thread:
    """One generation thread: a path of tokens from the prompt on, of which ``table`` holds the keys and values.

    Attributes:
        path: number of this thread among its parent's children, after the parent's path; () for the root.
        own_start: where in ``token_ids`` this thread's own tokens start.
        waiting: not running: not yet admitted, or preempted, or above the request's thread limit.
        state: memory of the request's method.
    """

    def __init__(
        self,
        request: "Request",
        token_ids: list[int],
        table: PageTable,
        *,
        parent: "Thread | None" = None,
    ) -> None:
        self.request = request
        self.number = len(request.threads)
        self.parent = parent
        self.path: tuple[int, ...] = () if parent is None else (*parent.path, parent.children)
        self.token_ids = token_ids
        self.own_start = len(token_ids)
        self.table = table
        self.children: int = 0
        self.waiting = True
        self.finish_reason: FinishReason | None = None
        self.state: dict[str, Any] = {}
        context = token_ids[-4:] if request.spec.echo and parent is None else []
        self.detokenizer = Detokenizer(request.tokenizer, context)
        self.stops = StopScanner(request.spec.stop_strings)

    @property
    def order(self) -> tuple[int, int]:
        """Earlier requests first, then earlier threads: who is admitted first and preempted last."""
        return self.request.arrival, self.number

    @property
    def prompt_length(self) -> int:
        return len(self.request.spec.prompt)

    @property
    def sampling(self) -> Sampling:
        return self.request.spec.sampling

    @property
    def draft(self) -> DraftSettings:
        return self.request.spec.draft

    @property
    def pending(self) -> int:
        """Committed tokens whose keys and values are not stored yet."""
        return len(self.token_ids) - self.table.length

    @property
    def remaining(self) -> int:
        return self.request.spec.max_new_tokens - (len(self.token_ids) - self.prompt_length)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def accept(self, tokens: list[int]) -> tuple[list[int], str]:
        """Append tokens up to the first one that ends the thread; returns those appended and the text they show."""
        shown = ""
        for count, token in enumerate(tokens, 1):
            self.token_ids.append(token)
            if token in self.request.spec.stop_token_ids:
                self.finish_reason = "stop"
            else:
                text, stopped = self.stops.push(self.detokenizer.push(token))
                shown += text
                if stopped or (self.request.spec.stop_when and self.request.spec.stop_when(self.token_ids)):
                    self.finish_reason = "stop"
                elif self.remaining <= 0:
                    self.finish_reason = "length"
            if self.finish_reason:
                return tokens[:count], shown + self.stops.flush()
        return tokens, shown


@dataclass
class Request:
    """A request's state in the engine. Only the engine's thread touches it, except for ``cancelled``."""

    spec: GenerationRequest
    tokenizer: Any
    sink: Sink
    arrival: int = 0  # set when it is queued
    threads: list[Thread] = field(default_factory=list)
    cancelled: bool = False
    accepted_at: float = field(default_factory=perf_counter)
    first_token_at: float | None = None
    prefill_ms: float = 0.0
    prefill_steps: int = 0
    steps: list[StepTrace] = field(default_factory=list)
    pace: Pace = field(default_factory=Pace)
    prompt_reports: list[TokenReport] = field(default_factory=list)
    completion_tokens: int = 0

    def elapsed_ms(self) -> float:
        return 1000 * (perf_counter() - self.accepted_at)

    @property
    def running(self) -> bool:
        return any(not thread.waiting and not thread.finished for thread in self.threads)

    @property
    def finished(self) -> bool:
        return all(thread.finished for thread in self.threads)

    def finish_reason(self) -> FinishReason:
        """Stop, unless some thread ran into its length limit."""
        return "length" if any(thread.finish_reason == "length" for thread in self.threads) else "stop"

    def record(self, steps: list[ThreadStep], *, forward_ms: float, width: int, batch_width: int, kv: int) -> StepTrace:
        """Add a step to the trace."""
        self.completion_tokens += sum(len(step.token_ids) for step in steps)
        trace = StepTrace(
            step=len(self.steps),
            t_ms=self.elapsed_ms(),
            forward_ms=forward_ms,
            width=width,
            batch_width=batch_width,
            kv_tokens=kv,
            threads=steps,
        )
        self.steps.append(trace)
        return trace

    def summary(self) -> TraceSummary:
        """Figures so far; called at the end."""
        first = self.first_token_at
        return summarise(
            self.steps,
            ttft_ms=None if first is None else 1000 * (first - self.accepted_at),
            elapsed_ms=self.elapsed_ms(),
            finish_reason=self.finish_reason(),
            exact=self.spec.is_exact,
            pace=self.pace.ratio,
        )
