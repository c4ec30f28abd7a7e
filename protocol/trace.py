"""Step traces: where every token of an answer came from.

Words: a *step* is a forward pass that commits at least one token of the request; *drafted* rows were offered as
candidates, *accepted* ones were committed after all cuts; ``token_ids`` are what the model chose (EOS and [Fork]
included, a forced [Child] not).
"""

from typing import Any

from protocol.reading_order import Whitespace
from protocol.wire import Wire


class ThreadStep(Wire):
    """What one step did to one thread."""

    thread: int
    parent: int | None = None
    drafted: int = 0
    accepted: int = 0
    token_ids: list[int] = []
    text: str = ""
    finish_reason: str | None = None
    token_logprobs: list[float] | None = None  # of token_ids, where the request asks for logprobs
    draft_token_ids: list[int] | None = None  # only with trace: "full"


class StepTrace(Wire):
    """One step of one request. Times in milliseconds."""

    step: int
    t_ms: float  # since the worker accepted the request
    forward_ms: float
    width: int  # rows of this request in the forward pass
    batch_width: int  # rows of all requests in it
    kv_tokens: int  # distinct committed rows of the request
    threads: list[ThreadStep]
    joins: list[list[int]] | None = None


class TraceHeader(Wire):
    """What was asked, of what, on what."""

    request_id: str
    model: str
    method: str
    exact: bool = True  # False: typical acceptance, the answer may differ from ordinary decoding's
    parameters: dict[str, Any]
    device: str
    dtype: str
    quantization: dict[str, str | float] | None = None  # kind, perplexity, reference_perplexity, agreement, tokens
    versions: dict[str, str]
    prompt_tokens: int
    prefill_ms: float  # time in forward passes that only read the prompt
    prefill_steps: int  # number of those passes
    prompt_token_ids: list[int] | None = None  # only with trace: "full"
    control_tokens: tuple[int, int] | None = None  # [Fork] and [Child], where threads may fork
    whitespace: Whitespace = "plain"  # between the texts of threads


class TraceSummary(Wire):
    """Figures of one finished request."""

    tokens: int
    steps: int
    tokens_per_step: float
    mean_acceptance_length: float
    draft_acceptance_rate: float = 0.0  # accepted rows over drafted ones
    acceptance_histogram: list[int]  # index = accepted rows in a thread-step
    acceptance_per_position: list[float] = []  # index i = share of thread-steps that accepted more than i rows
    ttft_ms: float | None = None
    tokens_per_s: float
    kv_peak_tokens: int
    finish_reason: str | None = None
    exact: bool = True  # as in the header
    pace: float | None = None  # speed over vanilla's by the latency curve; below 1 the drafts cost more than they bring


class RequestTrace(Wire):
    """The whole trace of one request; its size is linear in its tokens."""

    header: TraceHeader
    steps: list[StepTrace]
    summary: TraceSummary


def summarise(
    steps: list[StepTrace],
    *,
    ttft_ms: float | None,
    elapsed_ms: float,
    finish_reason: str | None,
    exact: bool = True,
    pace: float | None = None,
) -> TraceSummary:
    """Fold steps into a summary. ``mean_acceptance_length`` = 1 + accepted / thread-steps (vLLM's definition)."""
    tokens = sum(len(thread.token_ids) for step in steps for thread in step.threads)
    accepted = [thread.accepted for step in steps for thread in step.threads]
    drafted = sum(thread.drafted for step in steps for thread in step.threads)
    histogram = [0] * (max(accepted, default=0) + 1)
    for count in accepted:
        histogram[count] += 1
    return TraceSummary(
        tokens=tokens,
        steps=len(steps),
        tokens_per_step=tokens / len(steps) if steps else 0.0,
        mean_acceptance_length=1 + sum(accepted) / len(accepted) if accepted else 0.0,
        draft_acceptance_rate=sum(accepted) / drafted if drafted else 0.0,
        acceptance_histogram=histogram,
        acceptance_per_position=[sum(histogram[count:]) / len(accepted) for count in range(1, len(histogram))],
        ttft_ms=ttft_ms,
        tokens_per_s=1000 * tokens / elapsed_ms if elapsed_ms > 0 else 0.0,
        kv_peak_tokens=max((step.kv_tokens for step in steps), default=0),
        finish_reason=finish_reason,
        exact=exact,
        pace=pace,
    )
