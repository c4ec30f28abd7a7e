"""How fast a method decodes beside ordinary decoding, by the latency curve: what each of its steps cost and brought."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from workers.decoding.registry import BASELINE
from workers.model.curve import LatencyCurve

logger = logging.getLogger(__name__)

SLOWER = 0.97  # a ratio below this is worth a word
ENOUGH_STEPS = 64  # before it is said
MEMORY_STEPS = 4096  # of a method, after which the past counts half


@dataclass
class Pace:
    """Time that ordinary decoding would have taken for the tokens of some steps, and that they took."""

    ordinary_ms: float = 0.0
    spent_ms: float = 0.0
    steps: int = 0
    _warned: bool = field(default=False, repr=False)

    @property
    def ratio(self) -> float | None:
        """Speed over ordinary decoding's; None before the first step."""
        return self.ordinary_ms / self.spent_ms if self.spent_ms else None

    def add(self, ordinary_ms: float, spent_ms: float) -> None:
        """Count one step of one thread."""
        self.ordinary_ms += ordinary_ms
        self.spent_ms += spent_ms
        self.steps += 1
        if self.steps >= MEMORY_STEPS:
            self.ordinary_ms, self.spent_ms, self.steps = self.ordinary_ms / 2, self.spent_ms / 2, self.steps // 2

    def warn(self, method: str) -> None:
        """Log once whenever the method has become slower than ordinary decoding."""
        if self.ratio is None or self.steps < ENOUGH_STEPS or (self.ratio >= SLOWER) != self._warned:
            return
        self._warned = not self._warned
        if self._warned:
            advice = "leave its draft sizes to --tune, or use vanilla"
            logger.warning("%s decodes at %.2f x the speed of vanilla here: %s", method, self.ratio, advice)


@dataclass(frozen=True)
class Part:
    """An emitting thread's part in a step: its request's method and pace, rows of its draft, tokens that it emitted."""

    method: str
    pace: Pace
    rows: int
    tokens: int


class Pacer:
    """Keeps a pace for every request and every method but ordinary decoding, once a curve is known."""

    def __init__(self) -> None:
        self.curve: LatencyCurve | None = None
        self.methods: dict[str, Pace] = {}

    def record(self, parts: Sequence[Part], *, fixed: int, context: float, drafting_ms: float) -> None:
        """Account for a step.

        Args:
            parts: the threads that emitted tokens.
            fixed: rows of the step without drafts; their cost is shared equally.
            context: mean rows of KV behind a thread.
            drafting_ms: time spent on drafts outside the forward pass; shared like the drafts' rows.
        """
        drafting = [part for part in parts if part.method != BASELINE]
        if self.curve is None or not drafting:
            return
        rows = sum(part.rows for part in drafting)
        without = self.curve.at(fixed, context)
        extra = self.curve.at(fixed + rows, context) - without + drafting_ms
        bare = without / len(parts)
        for part in drafting:
            spent = bare + extra * (part.rows / rows if rows else 1 / len(drafting))
            of_method = self.methods.setdefault(part.method, Pace())
            for pace in (part.pace, of_method):
                pace.add(part.tokens * bare, spent)
            of_method.warn(part.method)
