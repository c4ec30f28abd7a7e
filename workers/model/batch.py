"""One step's rows: runs and token trees of all threads laid out as one ragged batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from workers.model.pages import PageTable, Slots
from workers.model.tree import EMPTY_TREE, Needs, TokenTree

_NO_ROWS = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Run:
    """What one thread puts into a step: committed tokens whose KV is not stored yet, and a draft behind them.

    Attributes:
        token_ids: R ≥ 1 tokens; the first one stands at position ``table.length``.
        table: the thread's pages, in which R rows behind ``table.length`` must be reserved.
        tree: hangs off the run's last row.
        last_needs: what the last row (the tree's root) wants back.
        needs: what every other row wants back.
    """

    token_ids: Sequence[int]
    table: PageTable
    tree: TokenTree = EMPTY_TREE
    last_needs: Needs = Needs.LOGITS
    needs: Needs = Needs.NOTHING


@dataclass
class Segment:
    """The rows of one run and its tree inside the step: ``start`` to ``stop``, the tree from ``tree_start`` on.

    Attributes:
        run: whose rows they are.
        path: int64[n], slots of the thread's rows up to the end of the run, on the model's device.
        span: the same slots as a slice, if they are consecutive.
        positions: int64[t] of the rows.
    """

    run: Run
    start: int
    tree_start: int
    stop: int
    path: torch.Tensor
    span: slice | None
    positions: np.ndarray
    plans: dict[int | None, "KeyPlan"] = field(default_factory=dict)

    @cached_property
    def visible(self) -> np.ndarray | None:
        """bool[t, t] among the rows: the run is causal, a tree row sees the run and its tree's; None for one row."""
        length, size = len(self.run.token_ids), len(self.run.tree)
        if length + size == 1:
            return None
        visible = np.zeros((length + size, length + size), dtype=bool)
        visible[:length, :length] = np.tri(length, dtype=bool)
        visible[length:, :length] = True
        visible[length:, length:] = self.run.tree.visibility()
        return visible

    def key_plan(self, window: int | None, step_base: int, device: torch.device) -> "KeyPlan":
        """Which slots this segment's rows read under a sliding window; computed once a step for all layers."""
        plan = self.plans.get(window)
        if plan is None:
            plan = self.plans[window] = self._make_plan(window, step_base, device)
        return plan

    def _make_plan(self, window: int | None, step_base: int, device: torch.device) -> "KeyPlan":
        length = len(self.path) - (self.tree_start - self.start)  # rows that were stored before this step
        first = 0 if window is None else max(0, min(length, int(self.positions.min()) - window + 1))
        slots = self._slots(first, step_base, device)
        if self.visible is None:
            return KeyPlan(slots, None)
        mask = np.concatenate([np.ones((len(self.positions), length - first), dtype=bool), self.visible], axis=1)
        if window is not None:
            key_positions = np.concatenate([np.arange(first, length), self.positions])
            mask = mask & (self.positions[:, None] - key_positions[None] < window)
        return KeyPlan(slots, None if mask.all() else torch.from_numpy(mask).to(device))

    def _slots(self, first: int, step_base: int, device: torch.device) -> Slots:
        """The path from row ``first`` on, then the tree's rows in the step buffers."""
        if self.tree_start == self.stop:
            return slice(self.span.start + first, self.span.stop) if self.span else self.path[first:]
        tree = torch.arange(step_base + self.tree_start, step_base + self.stop, device=device)
        return torch.cat([self.path[first:], tree])


@dataclass
class KeyPlan:
    """n slots to read, and which of them each row sees, bool[t, n] (None: all)."""

    slots: Slots
    visible: torch.Tensor | None
    bias: dict[tuple[int, torch.dtype], torch.Tensor] = field(default_factory=dict)

    def additive(self, groups: int, dtype: torch.dtype) -> torch.Tensor | None:
        """The mask as float[groups * t, n] to add to scores, repeated for the query heads of one key head."""
        if self.visible is None:
            return None
        key = (groups, dtype)
        if key not in self.bias:
            bias = torch.zeros(self.visible.shape, dtype=dtype, device=self.visible.device)
            self.bias[key] = bias.masked_fill_(~self.visible, -torch.inf).repeat(groups, 1)
        return self.bias[key]


@dataclass(frozen=True)
class StepBatch:
    """All rows of a step, thread after thread, each thread's run before its tree.

    Attributes:
        token_ids, positions: int64[T].
        slots: T slots, where each row's keys and values go: a page for a run's, the step buffers for a tree's.
        embedded_rows, embeddings: rows whose input is not their token's embedding, and float[E, hidden] for them.
        segments: one a run, in order.
        logit_rows, hidden_rows: rows that want logits, or their last hidden state, back; ascending.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: Slots
    embedded_rows: torch.Tensor
    embeddings: torch.Tensor | None
    segments: list[Segment]
    logit_rows: list[int]
    hidden_rows: list[int]

    def __len__(self) -> int:
        return len(self.token_ids)


def build_batch(runs: Sequence[Run], step_base: int, device: torch.device) -> StepBatch:
    """Lay out ``runs``; token ids of embedded rows are 0 (never looked at). The step buffers start at ``step_base``."""
    token_ids: list[int] = []
    positions: list[int] = []
    needs: list[Needs] = []
    segments: list[Segment] = []
    embeddings: list[torch.Tensor] = []
    slots: list[torch.Tensor] = []
    for run in runs:
        start = len(token_ids)
        token_ids += run.token_ids
        token_ids += run.tree.token_ids
        needs += [run.needs] * (len(run.token_ids) - 1) + [run.last_needs]
        needs += [
            need | (Needs.LOGITS if row else Needs.NOTHING)
            for need, row in zip(run.tree.needs, run.tree.candidate, strict=True)
        ]
        own = _positions(run)
        positions += own
        tree_start = start + len(run.token_ids)
        length = run.table.length
        path = run.table.slots(0, length + len(run.token_ids))
        span = run.table.span(0, length + len(run.token_ids))
        slots.append(path[length:])
        if run.tree:
            slots.append(torch.arange(step_base + tree_start, step_base + len(token_ids)))
        segments.append(
            Segment(
                run=run,
                start=start,
                tree_start=tree_start,
                stop=len(token_ids),
                path=path.to(device, non_blocking=True),
                span=span,
                positions=np.asarray(own),
            )
        )
        if run.tree.embeddings is not None:
            embeddings.append(run.tree.embeddings)
    ids = torch.tensor(token_ids)
    return StepBatch(
        token_ids=ids.clamp(min=0).to(device),
        positions=torch.tensor(positions, device=device),
        slots=slice(span.stop - len(ids), span.stop) if span and len(slots) == 1 else torch.cat(slots).to(device),
        embedded_rows=(ids < 0).nonzero()[:, 0].to(device) if embeddings else _NO_ROWS,
        embeddings=torch.cat(embeddings).to(device) if embeddings else None,
        segments=segments,
        logit_rows=[row for row, need in enumerate(needs) if need & Needs.LOGITS],
        hidden_rows=[row for row, need in enumerate(needs) if need & Needs.HIDDEN],
    )


def _positions(run: Run) -> list[int]:
    first = run.table.length
    last = first + len(run.token_ids) - 1
    return [*range(first, last + 1), *(last + depth for depth in run.tree.depths)]
