"""The model's side of a step: one ragged forward pass through a stock causal LM, and the KV storage behind it."""

import importlib.util
import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import psutil
import torch
import transformers
from transformers import PreTrainedModel

from workers.model import attention, linear
from workers.model.batch import Run, StepBatch, build_batch
from workers.model.checkpoint import ModelLoadError
from workers.model.devices import Stopwatch
from workers.model.kernels import NARROW_ROWS
from workers.model.kernels.build import load_kernels
from workers.model.kv import KVStore, LayerShape
from workers.model.pages import PAGE_ROWS, PagePool, PageTable, pages_for
from workers.model.plan import plan_attention
from workers.model.quantization import Int8Linear
from workers.model.stock import last_hidden_states, placeholder_mask
from workers.model.tree import Needs, TokenTree

if TYPE_CHECKING:
    from workers.model.graphs import StepGraphs

SELF_CHECK_TOKENS = 16
SELF_CHECK_TOLERANCE = {torch.float32: 5e-4, torch.float16: 2e-2, torch.bfloat16: 0.1}  # of the largest logit
FREE_MEMORY_SHARE = {"cpu": 0.25, "cuda": 0.85}
DEFAULT_CONTEXTS = 16  # by default no more KV than this many full contexts
FALLBACK_CONTEXT = 2048  # for configs that state no length


@dataclass(frozen=True)
class StepOutput:
    """Results of a step, on the model's device.

    Attributes:
        logits: float[len(batch.logit_rows), vocabulary].
        hidden: float[len(batch.hidden_rows), hidden], the last hidden states before the output projection, or None.
        watch: times the forward pass.
    """

    logits: torch.Tensor
    hidden: torch.Tensor | None
    watch: Stopwatch


class ModelRunner:
    """A model, its pages and its storage. Not thread-safe: one thread runs it.

    Attributes:
        kernels: the build of the CPU kernels that narrow steps run on; None on a GPU, in other types than float32 and
            where there is no compiler.
        narrow_rows: the most rows of a step that runs on them; 0 turns them off.
        graphs: runs narrow steps on a GPU; None on a CPU, and where Triton is missing.
        compiled: whether narrow steps run through a compiled decoder (see compiled.py).
    """

    def __init__(self, model: PreTrainedModel, *, kv_tokens: int | None = None, step_rows: int = 512) -> None:
        """Install tree attention, allocate ``kv_tokens`` rows of KV (None: from free memory) and check the model.

        Raises:
            ModelLoadError: the model's attention is not supported, or differs from stock attention.
        """
        self.model = model
        self.device = model.device
        self.step_rows = step_rows
        self.context_length = _context_length(model)
        self.vocabulary = model.get_output_embeddings().weight.shape[0]
        self._no_mask = placeholder_mask(self.device)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.kernels = load_kernels() if (self.device.type, model.dtype) == ("cpu", torch.float32) else None
        self.narrow_rows = NARROW_ROWS if self.kernels else 0
        self.compiled = False
        try:
            attention.install(model)
            linear.install(model)
            shapes = self._probe_shapes()
        except attention.UnsupportedAttention as error:
            raise ModelLoadError(str(error)) from error
        self.kv_tokens = _round_to_pages(kv_tokens or self._default_kv_tokens(shapes))
        self.context_length = min(self.context_length, self.kv_tokens)
        self.pool = PagePool(self.kv_tokens // PAGE_ROWS)
        self.kv_bytes = self._row_bytes(shapes) * (self.kv_tokens + step_rows)
        self._store = KVStore(shapes, self.pool.total, step_rows, model.dtype, self.device)
        self.graphs = self._step_graphs()
        self._self_check()

    def memory(self) -> dict[str, int]:
        """Bytes of the weights, of copies of them in other layouts, and of the KV storage."""
        tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers())}
        # The kernels read weights where they lie: no copy is packed for any width.
        return {"weights": sum(tensors.values()), "packed": 0, "kv": self.kv_bytes}

    @property
    def number_type(self) -> str:
        """The type of the weights' numbers, and that of the products' where they are quantised."""
        int8 = any(isinstance(module, Int8Linear) for module in self.model.modules())
        return "int8" if int8 else str(self.model.dtype).removeprefix("torch.")

    @cached_property
    def identity(self) -> str:
        """Equal for models, number types and versions that compute the same graph; weights do not count."""
        config = self.model.config.to_dict()
        for unrelated in ("_name_or_path", "transformers_version"):
            config.pop(unrelated, None)
        layers = sorted({type(module).__name__ for module in self.model.modules()})
        parts = [repr(sorted(config.items(), key=lambda item: item[0])), *layers, str(self.kernels)]
        return "\n".join([*parts, str(self.model.dtype), torch.__version__, transformers.__version__])

    def new_table(self) -> PageTable:
        """An empty page table."""
        return PageTable(self.pool)

    def fork(self, table: PageTable) -> PageTable:
        """A table that shares ``table``'s rows; copies at most one page. Raises OutOfPages."""
        twin, copy = table.fork()
        if copy:
            self._store.copy_page(*copy)
        return twin

    def prepare(self, runs: Sequence[Run]) -> StepBatch:
        """Lay out a step of at most ``step_rows`` rows."""
        batch = build_batch(runs, self._store.step_base, self.device)
        if len(batch) > self.step_rows:
            raise ValueError(f"a step of {len(batch)} rows exceeds the {self.step_rows} of the step buffers")
        return batch

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> StepOutput:
        """Run the model over a step.

        Keys and values of runs are in their pages afterwards (``table.advance`` makes them count), those of trees in
        the step buffers until the next step.
        """
        watch = Stopwatch(self.device)
        if self.graphs and self.graphs.takes(batch) and (found := self.graphs.run(batch)):
            watch.stop()
            return StepOutput(found[0], found[1] if batch.hidden_rows else None, watch)
        collect: AbstractContextManager[list[torch.Tensor]] = (
            last_hidden_states(self.model) if batch.hidden_rows else nullcontext([])
        )
        with attention.step_attention(self._context(batch)), collect as states:
            logits = self._logits(batch)
        hidden = states[0][batch.hidden_rows] if states else None
        watch.stop()
        return StepOutput(logits, hidden, watch)

    def _context(self, batch: StepBatch) -> attention.StepContext:
        plan = plan_attention(batch) if len(batch) <= self.narrow_rows else None
        return attention.StepContext(self._store, batch.slots, batch.segments, plan)

    @torch.inference_mode()
    def commit(self, step_rows: Sequence[int], slots: torch.Tensor) -> None:
        """Copy accepted tree rows of the last step into page slots int64[n] (see ``PageTable.slots``)."""
        rows = torch.tensor(step_rows, dtype=torch.int64, device=self.device)
        self._store.commit(rows, slots.to(self.device))

    @contextmanager
    def trial_step(self, rows: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Inside the block, the decoder may be called as in a narrow step of ``rows`` rows that leaves nothing behind.

        Yields its embeddings float[1, rows, hidden] and positions int64[1, rows].
        """
        table = self.new_table()
        table.reserve(rows)
        try:
            batch = self.prepare([Run([row % self.vocabulary for row in range(rows)], table)])
            with torch.no_grad():
                embeddings = self.model.get_input_embeddings()(batch.token_ids)[None]
            with attention.step_attention(self._context(batch)):
                yield embeddings, batch.positions[None]
        finally:
            table.release()

    @torch.inference_mode()
    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """float[hidden]: the mean of the last hidden states, of unit length (stock attention, no pages)."""
        ids = torch.tensor([token_ids], device=self.device)
        states = self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        return torch.nn.functional.normalize(states.float().mean(0), dim=0)

    def _logits(self, batch: StepBatch) -> torch.Tensor:
        wants_all = len(batch.logit_rows) == len(batch)
        rows = torch.tensor(batch.logit_rows or [0], dtype=torch.int64, device=self.device)
        keep = {"logits_to_keep": 0 if wants_all else rows} if self._keeps_logits else {}
        logits = self.model(
            **self._inputs(batch),
            attention_mask=self._no_mask,
            position_ids=batch.positions[None],
            use_cache=False,
            return_dict=True,
            **keep,
        ).logits[0]
        logits = logits if keep or wants_all else logits[rows]
        return logits if batch.logit_rows else logits[:0]

    def _inputs(self, batch: StepBatch) -> dict[str, torch.Tensor]:
        if batch.embeddings is None:
            return {"input_ids": batch.token_ids[None]}
        embeddings = self.model.get_input_embeddings()(batch.token_ids)
        embeddings[batch.embedded_rows] = batch.embeddings.to(embeddings.dtype)
        return {"inputs_embeds": embeddings[None]}

    @torch.inference_mode()
    def _probe_shapes(self) -> dict[int, LayerShape]:
        probe = attention.ShapeProbe({})
        with attention.step_attention(probe):
            token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
            self.model(input_ids=token, attention_mask=self._no_mask, use_cache=False)
        if not probe.shapes:
            raise ModelLoadError(
                f"{type(self.model).__name__} has no layer that uses transformers' attention interface"
            )
        return probe.shapes

    def _step_graphs(self) -> "StepGraphs | None":
        if self.device.type != "cuda" or importlib.util.find_spec("triton") is None:
            return None
        from workers.model.graphs import StepGraphs

        return StepGraphs(self.model, self._store, self.context_length)

    def _default_kv_tokens(self, shapes: dict[int, LayerShape]) -> int:
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
        else:
            free = psutil.virtual_memory().available
        affordable = int(free * FREE_MEMORY_SHARE[self.device.type]) // self._row_bytes(shapes) - self.step_rows
        return max(PAGE_ROWS, min(affordable, DEFAULT_CONTEXTS * self.context_length))

    def _row_bytes(self, shapes: dict[int, LayerShape]) -> int:
        return sum(shape.row_elements for shape in shapes.values()) * self.model.dtype.itemsize

    @torch.inference_mode()
    def _self_check(self) -> None:
        """Compare stock attention with ours: a prompt in two chunks, then a chain and a branch as a tree.

        Raises:
            ModelLoadError: they differ, or the model passes something to attention that ours does not know.
        """
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.vocabulary, (SELF_CHECK_TOKENS,), generator=generator).tolist()
        try:
            ours = self._logits_in_pieces(ids)
        except attention.UnsupportedAttention as error:
            raise ModelLoadError(str(error)) from error
        stock = self.model(input_ids=torch.tensor([ids], device=self.device), use_cache=False).logits[0, -6:]
        difference = (ours - stock).abs().max().item()
        largest = stock.abs().max().item()
        tolerance = SELF_CHECK_TOLERANCE[torch.float16 if self.number_type == "int8" else self.model.dtype]
        if not math.isfinite(difference) or difference > tolerance * largest:
            raise ModelLoadError(
                f"{type(self.model).__name__} is not supported: over token trees its logits differ from its own "
                f"by {difference:.2g} where the largest is {largest:.2g}"
            )

    def _logits_in_pieces(self, ids: list[int]) -> torch.Tensor:
        """Logits of the last 6 of 16 tokens: 7 and 4 of them as chunks, 5 as a chain in a tree with a side branch."""
        table = self.new_table()
        try:
            table.reserve(len(ids))
            for start, stop in ((0, 7), (7, 10)):
                self.forward(self.prepare([Run(ids[start:stop], table)]))
                table.advance(stop - start)
            chain = [ids[0], *ids[11:]]  # row 0 is the side branch
            tree = TokenTree.of(chain, [-1, -1, 1, 2, 3, 4], needs=[Needs.LOGITS] * 6)
            logits = self.forward(self.prepare([Run([ids[10]], table, tree)])).logits
            return torch.cat([logits[:1], logits[2:]])
        finally:
            table.release()


def _round_to_pages(rows: int) -> int:
    return pages_for(rows) * PAGE_ROWS


def _context_length(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        if isinstance(length := getattr(config, name, None), int) and length > 0:
            return length
    return FALLBACK_CONTEXT
