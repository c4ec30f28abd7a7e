"""Narrow steps on a GPU: tensors of fixed shape that a step fills, and one captured graph a row bucket that reads them.

Rows beyond the step's own are computed with it and belong to nobody: each sees only itself. Nothing waits for the GPU:
what a step needs goes there in one copy. On a CPU the same tensors are read without a graph, for tests.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from workers.model.attention import StepContext, step_attention
from workers.model.batch import StepBatch
from workers.model.kernels.gpu import StepTables
from workers.model.kv import KVStore
from workers.model.pages import pages_for
from workers.model.stock import last_hidden_states, placeholder_mask

logger = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
_COLUMNS = ("token_ids", "slots", "embedded", "logit_rows", "hidden_rows", "positions", "stops", "owners")


def bucket_of(rows: int) -> int:
    """The fewest rows of a graph that holds ``rows`` rows, of which there are at most the last bucket's."""
    return next(bucket for bucket in BUCKETS if bucket >= rows)


class StaticStep:
    """The inputs of a step of ``rows`` rows, at fixed addresses.

    Attributes:
        token_ids, slots: int32[R].
        logit_rows, hidden_rows: int32[R], of which a step uses the first few.
        embedded: int32[R]; rows where it is nonzero take their line of ``embeddings``, float[R, hidden].
        tables: what attention reads.
    """

    def __init__(
        self, rows: int, context: int, hidden: int, step_base: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rows = rows
        self._step_base = step_base
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_COLUMNS, (rows,))
        shapes |= {"visible": (rows, rows), "pages": (rows, pages_for(context))}
        size = sum(int(np.prod(shape)) for shape in shapes.values())
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self._fields: dict[str, np.ndarray] = {}
        fields: dict[str, torch.Tensor] = {}
        start = 0
        for name, shape in shapes.items():
            stop = start + int(np.prod(shape))
            self._fields[name] = self._host[start:stop].view(shape).numpy()
            fields[name] = self._device[start:stop].view(shape)
            start = stop
        self.token_ids, self.slots, self.embedded = (fields[name] for name in _COLUMNS[:3])
        self.logit_rows, self.hidden_rows = fields["logit_rows"], fields["hidden_rows"]
        self.tables = StepTables(*(fields[name] for name in ("positions", "stops", "owners", "visible", "pages")))
        self.embeddings = torch.zeros(rows, hidden, dtype=dtype, device=device)

    def fill(self, batch: StepBatch) -> None:
        """Take over a step of at most ``rows`` rows; the copies to the device are queued, not waited for."""
        field, own = self._fields, len(batch)
        for values in field.values():
            values[...] = 0
        field["slots"][:] = np.arange(self._step_base, self._step_base + self.rows)
        np.fill_diagonal(field["visible"][own:, own:], 1)
        field["logit_rows"][: len(batch.logit_rows)] = batch.logit_rows
        field["hidden_rows"][: len(batch.hidden_rows)] = batch.hidden_rows
        for line, segment in enumerate(batch.segments):
            run, rows = segment.run, slice(segment.start, segment.stop)
            length = run.table.length + len(run.token_ids)
            field["token_ids"][rows] = [max(token, 0) for token in (*run.token_ids, *run.tree.token_ids)]
            field["embedded"][rows] = [token < 0 for token in (*run.token_ids, *run.tree.token_ids)]
            field["positions"][rows] = segment.positions
            field["owners"][rows] = line
            field["pages"][line, : len(run.table.pages)] = run.table.pages
            field["slots"][segment.start : segment.tree_start] = run.table.slots(run.table.length, length)
            field["stops"][segment.start : segment.tree_start] = np.arange(run.table.length + 1, length + 1)
            if run.tree:
                tree = slice(segment.tree_start, segment.stop)
                field["stops"][tree] = length
                field["visible"][tree, tree] = run.tree.visibility()
        self._device.copy_(self._host, non_blocking=True)
        if batch.embeddings is not None:
            self.embeddings.index_copy_(0, batch.embedded_rows, batch.embeddings.to(self.embeddings.dtype))


@dataclass(frozen=True)
class Captured:
    """A step's graph, and where it leaves logits float[R, vocabulary] and hidden states float[R, hidden]."""

    step: StaticStep
    replay: Callable[[], None]
    logits: torch.Tensor
    hidden: torch.Tensor


class StepGraphs:
    """Runs narrow steps of a model through captured graphs, each captured when it is first needed."""

    def __init__(self, model: PreTrainedModel, store: KVStore, context: int) -> None:
        self._model: Any = model
        self._store = store
        self._context = context
        self._captured: dict[tuple[int, bool], Captured] = {}
        self._mask = placeholder_mask(model.device)
        self.failed = False

    def takes(self, batch: StepBatch) -> bool:
        """Whether a step is narrow enough, and the model can be captured."""
        return not self.failed and len(batch) <= BUCKETS[-1]

    def run(self, batch: StepBatch) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Logits and hidden states of the rows that want them; None if the model turns out not to be capturable."""
        key = bucket_of(len(batch)), batch.embeddings is not None
        if key not in self._captured:
            try:
                self._captured[key] = self._capture(batch, *key)
            except RuntimeError as error:  # for instance experts whose shapes depend on the data
                self.failed = True
                logger.warning("steps run without graphs: %s", str(error).strip().split("\n")[0])
                return None
        captured = self._captured[key]
        step = captured.step
        step.fill(batch)
        captured.replay()
        logits = captured.logits.index_select(0, step.logit_rows[: len(batch.logit_rows)])
        return logits, captured.hidden.index_select(0, step.hidden_rows[: len(batch.hidden_rows)])

    def _capture(self, batch: StepBatch, rows: int, embedded: bool) -> Captured:
        embeddings = self._model.get_input_embeddings().weight
        device = self._model.device
        step = StaticStep(rows, self._context, embeddings.shape[1], self._store.step_base, embeddings.dtype, device)
        step.fill(batch)
        logits, hidden = self._compute(step, embedded)
        if device.type != "cuda":
            return Captured(step, partial(self._repeat, step, embedded, logits, hidden), logits, hidden)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits, hidden = self._compute(step, embedded)
        return Captured(step, graph.replay, logits, hidden)

    def _repeat(self, step: StaticStep, embedded: bool, logits: torch.Tensor, hidden: torch.Tensor) -> None:
        for place, value in zip((logits, hidden), self._compute(step, embedded), strict=True):
            place.copy_(value)

    def _compute(self, step: StaticStep, embedded: bool) -> tuple[torch.Tensor, torch.Tensor]:
        inputs: dict[str, torch.Tensor] = {"input_ids": step.token_ids[None]}
        if embedded:
            own = self._model.get_input_embeddings()(step.token_ids)
            inputs = {"inputs_embeds": torch.where(step.embedded[:, None] != 0, step.embeddings, own)[None]}
        context = StepContext(self._store, step.slots.long(), [], step.tables)
        with step_attention(context), last_hidden_states(self._model) as hidden:
            out = self._model(
                **inputs,
                attention_mask=self._mask,
                position_ids=step.tables.positions[None].long(),
                use_cache=False,
                return_dict=True,
            )
        return out.logits[0], hidden[0]
