"""A request being answered, and its generation threads."""

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from protocol.errors import RequestError
from protocol.generation import DraftSettings, FinishReason, TraceLevel
from protocol.reading_order import ReadingOrder, Whitespace
from protocol.trace import StepTrace, ThreadStep, TraceHeader, TraceSummary, summarise
from workers.forking import Forking
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
        max_total_tokens: of all threads together; the request ends in the step in which they reach it. None: no limit.
        forking: how threads may fork; None for models without control tokens.
        whitespace: what stands between the texts of threads.
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
    max_total_tokens: int | None = None
    forking: Forking | None = None
    whitespace: Whitespace = "plain"

    @property
    def is_exact(self) -> bool:
        """Whether the answer is the one of ordinary decoding; at temperature 0 typical acceptance is exact as well."""
        return self.draft.acceptance != "typical" or self.sampling.greedy

    @property
    def fork(self) -> int | None:
        """The token with which a thread forks."""
        return self.forking.tokens.fork if self.forking else None

    @property
    def terminal(self) -> frozenset[int]:
        """Tokens behind which a step emits nothing more on the same thread."""
        return self.stop_token_ids if self.fork is None else self.stop_token_ids | {self.fork}

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


@dataclass(frozen=True)
class Accepted:
    """What a thread took in: tokens, their text, and of it what stands before a stop string of its own."""

    tokens: list[int]
    text: str
    shown: str


class Thread:
    """One generation thread: a path of tokens from the prompt on, of which ``table`` holds the keys and values.

    Attributes:
        path: number of this thread among its parent's children, after the parent's path; () for the root.
        own_start: where in ``token_ids`` this thread's own tokens start.
        waiting: not running: not yet admitted, or preempted, or above the request's thread limit.
        cut: whether a stop string ended it.
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
        self.cut = False
        self.finish_reason: FinishReason | None = None
        self.state: dict[str, Any] = {}
        self.detokenizer = Detokenizer(request.tokenizer, self._text_before())
        self.stops = StopScanner(request.spec.stop_strings)

    def _text_before(self) -> list[int]:
        """The last tokens whose text stands directly before this thread's first one."""
        spec = self.request.spec
        unwanted = not spec.echo if self.parent is None else spec.whitespace == "published"
        if unwanted:
            return []
        hidden = {spec.fork, spec.forking.tokens.child} if spec.forking else set()
        return [token for token in self.token_ids[-8:] if token not in hidden][-4:]

    @property
    def order(self) -> tuple[int, int]:
        """Earlier requests first, then earlier threads: who is admitted first and preempted last."""
        return self.request.arrival, self.number

    @property
    def prompt_length(self) -> int:
        return len(self.request.spec.prompt)

    @property
    def sampling(self) -> Sampling:
        """How its next token is chosen."""
        free, unforked = self.request.samplings
        forking = self.request.spec.forking
        may_fork = forking is not None and forking.allows(1 + len(self.path), self.children, self.request.live_threads)
        return free if may_fork else unforked

    @property
    def forks(self) -> bool:
        """Whether its last token opens a child."""
        return self.token_ids[-1] == self.request.spec.fork and len(self.token_ids) > self.own_start

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

    def accept(self, tokens: list[int]) -> Accepted:
        """Append tokens up to the first one that ends the thread."""
        text = shown = ""
        for count, token in enumerate(tokens, 1):
            self.token_ids.append(token)
            if token in self.request.spec.stop_token_ids:
                self.finish_reason = "stop"
            else:
                said = self._text_of(token)
                more, self.cut = self.stops.push(said)
                text, shown = text + said, shown + more
                if self.cut or (self.request.spec.stop_when and self.request.spec.stop_when(self.token_ids)):
                    self.finish_reason = "stop"
                elif self.remaining <= 0:
                    self.finish_reason = "length"
            if self.finish_reason or token == self.request.spec.fork:
                shown += self.stops.flush()
            if self.finish_reason:
                return Accepted(tokens[:count], text, shown)
        return Accepted(tokens, text, shown)

    def _text_of(self, token: int) -> str:
        if token != self.request.spec.fork:
            return self.detokenizer.push(token)
        if self.request.spec.whitespace == "published":  # which decodes what stands between forks alone
            self.detokenizer = Detokenizer(self.request.tokenizer)
        return ""


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

    def __post_init__(self) -> None:
        spec = self.spec
        self.samplings = spec.forking.samplings(spec.sampling) if spec.forking else (spec.sampling, spec.sampling)
        self.reading = ReadingOrder(spec.whitespace)
        self.stops = StopScanner(spec.stop_strings)  # these decide; the threads' own only end threads early
        self.stopped = False

    def live_threads(self) -> int:
        """Threads that have not ended, running or not."""
        return sum(not thread.finished for thread in self.threads)

    def elapsed_ms(self) -> float:
        return 1000 * (perf_counter() - self.accepted_at)

    @property
    def running(self) -> bool:
        return any(not thread.waiting and not thread.finished for thread in self.threads)

    @property
    def finished(self) -> bool:
        return all(thread.finished for thread in self.threads)

    def end(self, reason: FinishReason) -> None:
        """End all threads that have not ended."""
        for thread in self.threads:
            if not thread.finished:
                thread.finish_reason = reason
                self.reading.finish(thread.number)

    def read(self) -> tuple[str, list[TokenReport]]:
        """What became readable since the last call; with a stop string all ends."""
        text, reports = "", []
        for said, items in self.reading.take():
            shown, self.stopped = self.stops.push(said)
            text += shown
            reports += items
            if self.stopped:
                self.end("stop")
                break
        return text + (self.stops.flush() if self.finished else ""), reports

    def finish_reason(self) -> FinishReason:
        """Stop, unless some thread of a text that no stop string ended ran into its length limit."""
        cut = any(thread.finish_reason == "length" for thread in self.threads)
        return "length" if cut and not self.stopped else "stop"

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
