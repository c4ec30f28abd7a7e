"""Which draft sizes pay here: expected tokens over expected time, by the latency curve and live acceptance."""

from collections.abc import Sequence

from workers.decoding.interface import Budget, DraftThread, Outcome
from workers.model.curve import LatencyCurve

MEMORY = 20.0  # expected acceptances after which the past counts half
RECOVERY = 0.98  # a step without a draft
PRIOR = 1.0  # acceptances that a method's own estimate is worth
LEAST = 0.15  # tokens a step that drafts must have brought lately to be worth the time of making them, ...
REST = 8  # ... else only one step in so many is drafted
RECENT = 0.2  # what a step weighs in that
MARGIN = 1.03  # a draft must promise this much more: estimates err, and drafts cost time outside the forward pass


class Tuner:
    """Turns a method's estimates into sizes. Until a curve is known, every candidate counts as worth its row.

    Attributes:
        curve: what a forward pass costs; None until it is measured, and with tuning off.
    """

    def __init__(self) -> None:
        self.curve: LatencyCurve | None = None

    def budget(self, rows: int, *, fixed: int, emitting: int, drafting: int, context: float) -> Budget:
        """Sizes for a step.

        Args:
            rows: most rows of one thread's tree.
            fixed: rows of the step without drafts.
            emitting: threads that will emit at least one token.
            drafting: those of them that draft; each is taken to draft as much as the one that asks.
            context: mean rows of KV behind a thread.
        """
        if self.curve is None:
            return Budget(rows)
        return _Tuned(rows, self.curve, fixed, emitting, drafting, context)

    def observe(self, threads: Sequence[DraftThread], outcomes: Sequence[Outcome]) -> None:
        """Learn how a thread's estimates compare with what was accepted."""
        for thread, outcome in zip(threads, outcomes, strict=True):
            seen: list[float] = thread.state.setdefault("tuning", [0.0, 0.0])
            if expected := sum(outcome.tree.chances):
                seen[0] += expected
                seen[1] += len(outcome.rows)
            else:  # what was disappointed tries again some day
                seen[:] = [value * RECOVERY for value in seen]
            if seen[0] > MEMORY:
                seen[:] = [value / 2 for value in seen]
            gain, rested = thread.state.get("asking", (0.0, True))
            if not rested:
                thread.state["asking"][0] += RECENT * (len(outcome.rows) - gain)


def trust(thread: DraftThread) -> float:
    """Accepted over expected rows of a thread so far."""
    expected, accepted = thread.state.get("tuning", (0.0, 0.0))
    return (accepted + PRIOR) / (expected + PRIOR)


class _Tuned(Budget):
    """A budget with a price."""

    def __init__(
        self, rows: int, curve: LatencyCurve, fixed: int, emitting: int, drafting: int, context: float
    ) -> None:
        super().__init__(rows)
        self._curve = curve
        self._fixed = fixed
        self._emitting = emitting
        self._drafting = drafting
        self._context = context

    def worth(self, thread: DraftThread, chances: Sequence[float], *, beside: int = 0) -> int:
        scale = min(1.0 / max(chances, default=1.0), trust(thread))
        gain, best, best_rate = 0.0, 0, MARGIN * self._rate(beside, 0.0)
        for count, chance in enumerate(chances[: self.rows], 1):
            gain += scale * chance
            rate = self._rate(beside + count, gain)
            if rate > best_rate:
                best, best_rate = count, rate
        return best

    def asks(self, thread: DraftThread) -> bool:
        asking: list[float] = thread.state.setdefault("asking", [0.5, 0])  # tokens brought, steps rested
        asking[1] = 0 if asking[0] >= LEAST else (asking[1] + 1) % REST
        return asking[1] == 0

    def best(self, options: Sequence[tuple[int, float]], default: int, thread: DraftThread | None = None) -> int | None:
        scale = 1.0 if thread is None else trust(thread)
        rates = [self._rate(rows, scale * gain) for rows, gain in options]
        return rates.index(max(rates)) if max(rates) > MARGIN * self._rate(0, 0.0) else None

    def _rate(self, rows: int, gain: float) -> float:
        """Tokens a millisecond if every drafting thread adds so many rows and gains so many tokens."""
        tokens = self._emitting + self._drafting * gain
        return tokens / self._curve.at(self._fixed + self._drafting * rows, self._context)
