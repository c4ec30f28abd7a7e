"""Which draft sizes pay here: expected tokens over expected time, by the latency curve and live acceptance."""

from collections.abc import Sequence
from dataclasses import dataclass

from workers.decoding.interface import Budget, DraftThread, Outcome
from workers.model.curve import LatencyCurve

MEMORY = 20.0  # expected acceptances after which the past counts half
RECOVERY = 0.98  # a step without a draft
PRIOR = 1.0  # acceptances that a method's own estimate is worth
REST = 8  # where drafts have cost more than they brought lately, only one step in so many is drafted
RECENT = 0.2  # what a step weighs in that
MARGIN = 1.03  # a draft must promise this much more: estimates err, and drafts cost time outside the forward pass


@dataclass
class Asking:
    """Whether making drafts has paid for a thread lately.

    Attributes:
        gain: tokens that a step with a draft added.
        extra: what such a step cost beside one without, as a share of the latter.
        rested: steps since the last one.
    """

    gain: float = 0.5
    extra: float = 0.1
    rested: int = 0

    @property
    def pays(self) -> bool:
        return 1 + self.gain >= MARGIN * (1 + self.extra)

    def learn(self, gain: float, extra: float) -> None:
        """Take in a step with a draft."""
        self.gain += RECENT * (gain - self.gain)
        self.extra += RECENT * (extra - self.extra)


class Tuner:
    """Turns a method's estimates into sizes. Until a curve is known, every candidate counts as worth its row.

    Attributes:
        curve: what a forward pass costs; None until it is measured, and with tuning off.
    """

    def __init__(self) -> None:
        self.curve: LatencyCurve | None = None
        self._fixed, self._context = 1, 0.0  # of the running step

    def budget(self, rows: int, *, fixed: int, emitting: int, drafting: int, context: float) -> Budget:
        """Sizes for a step.

        Args:
            rows: most rows of one thread's tree.
            fixed: rows of the step without drafts.
            emitting: threads that will emit at least one token.
            drafting: those of them that draft; each is taken to draft as much as the one that asks.
            context: mean rows of KV behind a thread.
        """
        self._fixed, self._context = fixed, context
        if self.curve is None:
            return Budget(rows)
        return _Tuned(rows, self.curve, fixed, emitting, drafting, context)

    def observe(self, threads: Sequence[DraftThread], outcomes: Sequence[Outcome], drafting_ms: float = 0.0) -> None:
        """Learn how a thread's estimates compare with what was accepted, and what that cost.

        Args:
            drafting_ms: time that the step spent on making drafts.
        """
        extra = self._extra(sum(len(outcome.tree) for outcome in outcomes), drafting_ms)
        for thread, outcome in zip(threads, outcomes, strict=True):
            seen: list[float] = thread.state.setdefault("tuning", [0.0, 0.0])
            if expected := sum(outcome.tree.chances):
                seen[0] += expected
                seen[1] += len(outcome.rows)
            else:  # what was disappointed tries again some day
                seen[:] = [value * RECOVERY for value in seen]
            if seen[0] > MEMORY:
                seen[:] = [value / 2 for value in seen]
            asking: Asking | None = thread.state.get("asking")
            if asking and not asking.rested:
                asking.learn(len(outcome.rows), extra)

    def _extra(self, rows: int, drafting_ms: float) -> float:
        """What a step's drafts cost as a share of the step without them."""
        if self.curve is None:
            return 0.0
        without = self.curve.at(self._fixed, self._context)
        return (self.curve.at(self._fixed + rows, self._context) + drafting_ms) / without - 1


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
        asking: Asking = thread.state.setdefault("asking", Asking())
        asking.rested = 0 if asking.pays else (asking.rested + 1) % REST
        return not asking.rested

    def best(self, options: Sequence[tuple[int, float]], default: int, thread: DraftThread | None = None) -> int | None:
        scale = 1.0 if thread is None else trust(thread)
        rates = [self._rate(rows, scale * gain) for rows, gain in options]
        return rates.index(max(rates)) if max(rates) > MARGIN * self._rate(0, 0.0) else None

    def _rate(self, rows: int, gain: float) -> float:
        """Tokens a millisecond if every drafting thread adds so many rows and gains so many tokens."""
        tokens = self._emitting + self._drafting * gain
        return tokens / self._curve.at(self._fixed + self._drafting * rows, self._context)
