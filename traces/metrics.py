"""Figures over many requests: sums first, ratios last."""

from dataclasses import dataclass

from protocol.trace import TraceSummary
from traces.results import Record


@dataclass(frozen=True)
class Figures:
    """Sums over requests, and the ratios of these sums."""

    questions: int = 0
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    accepted: int = 0
    thread_steps: int = 0

    def __add__(self, other: "Figures") -> "Figures":
        return Figures(
            self.questions + other.questions,
            self.tokens + other.tokens,
            self.steps + other.steps,
            self.seconds + other.seconds,
            self.accepted + other.accepted,
            self.thread_steps + other.thread_steps,
        )

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps if self.steps else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Speed of one stream: requests that ran side by side count their time each."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        return 1 + self.accepted / self.thread_steps if self.thread_steps else 0.0


def figures_of(record: Record) -> Figures:
    """The figures of one answered question, all turns together."""
    summaries = [TraceSummary.model_validate(trace["summary"]) for trace in record["traces"]]
    return sum(map(_of_request, summaries), Figures(questions=1))


def _of_request(summary: TraceSummary) -> Figures:
    return Figures(
        tokens=summary.tokens,
        steps=summary.steps,
        seconds=summary.tokens / summary.tokens_per_s if summary.tokens_per_s else 0.0,
        accepted=sum(accepted * count for accepted, count in enumerate(summary.acceptance_histogram)),
        thread_steps=sum(summary.acceptance_histogram),
    )


def by_category(records: list[tuple[str, Figures]]) -> dict[str, Figures]:
    """Add up (category, figures) pairs; categories in order of their first appearance."""
    sums: dict[str, Figures] = {}
    for category, figures in records:
        sums[category] = sums.get(category, Figures()) + figures
    return sums
