"""What the CPU attention kernel reads of a step: which keys each row sees, in chunks (see kernels/attention.h)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from workers.model.batch import Run, StepBatch
from workers.model.pages import PAGE_ROWS

CHUNK_PAGES = 8
CHUNK = CHUNK_PAGES * PAGE_ROWS


@dataclass(frozen=True)
class AttentionPlan:
    """All int64. A row's keys: its path up to its stop, then the rows of its tree that it sees.

    Attributes:
        slots, positions, stops: [T].
        first_partial: [T + 1], where each row's chunks start in a list of all.
        tree_offsets, tree_keys: [T + 1] and the step rows that each row sees of its tree, ascending.
        item_chunks: [I], which chunk of its rows' keys an item is.
        item_pages: [I, CHUNK_PAGES].
        item_offsets, item_rows: [I + 1] and the rows that see each item's keys.
    """

    slots: torch.Tensor
    positions: torch.Tensor
    stops: torch.Tensor
    first_partial: torch.Tensor
    tree_offsets: torch.Tensor
    tree_keys: torch.Tensor
    item_chunks: torch.Tensor
    item_pages: torch.Tensor
    item_offsets: torch.Tensor
    item_rows: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The fields, in the order in which ``begin_step`` takes them."""
        return tuple(vars(self).values())


def plan_attention(batch: StepBatch) -> AttentionPlan:
    """Plan a step; threads that share full pages share the item, so that its keys are read once."""
    stops: list[int] = []
    seen: list[int] = []  # tree rows that each row sees
    chunks: list[int] = []
    tree_keys: list[int] = []
    items: dict[tuple[int, ...], list[int]] = {}
    for segment in batch.segments:
        run = segment.run
        length = run.table.length + len(run.token_ids)
        own_stops = [*range(run.table.length + 1, length + 1), *[length] * len(run.tree)]
        own_seen = [0] * len(run.token_ids)
        if run.tree:
            visible = run.tree.visibility()
            own_seen += visible.sum(1).tolist()
            tree_keys += (visible.nonzero()[1] + segment.tree_start).tolist()
        own_chunks = [_chunks(path + tree) for path, tree in zip(own_stops, own_seen, strict=True)]
        _add_items(items, run, segment.start, length, own_chunks)
        chunks += own_chunks
        stops += own_stops
        seen += own_seen
    return AttentionPlan(
        slots=_slots(batch),
        positions=batch.positions,
        stops=torch.tensor(stops),
        first_partial=_offsets(chunks),
        tree_offsets=_offsets(seen),
        tree_keys=torch.tensor(tree_keys, dtype=torch.int64),
        item_chunks=torch.tensor([key[1] for key in items]),
        item_pages=torch.tensor([key[2:] for key in items]),
        item_offsets=_offsets([len(rows) for rows in items.values()]),
        item_rows=torch.tensor([row for rows in items.values() for row in rows]),
    )


def _add_items(items: dict[tuple[int, ...], list[int]], run: Run, start: int, length: int, chunks: list[int]) -> None:
    """Add a thread's chunks: key (the thread or -1 if shared, chunk, its pages), value the rows that see it."""
    pages = [*run.table.pages, *[0] * CHUNK_PAGES]  # behind the last page are only tree rows
    for chunk in range(max(chunks)):
        owner = -1 if (chunk + 1) * CHUNK <= length else start
        own = pages[chunk * CHUNK_PAGES : (chunk + 1) * CHUNK_PAGES]
        own += [0] * (CHUNK_PAGES - len(own))
        rows = [start + row for row, count in enumerate(chunks) if chunk < count]
        items.setdefault((owner, chunk, *own), []).extend(rows)


def _chunks(keys: int) -> int:
    return -(-keys // CHUNK)


def _offsets(counts: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]))


def _slots(batch: StepBatch) -> torch.Tensor:
    if isinstance(batch.slots, slice):
        return torch.arange(batch.slots.start, batch.slots.stop)
    return batch.slots
