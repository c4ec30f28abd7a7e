"""``model.generate(..., custom_generate=...)``: every method inside transformers' own ``generate``.

transformers prepares everything (generation config, logits processors, stopping criteria, streamer); the engine's core
decodes, on the user's own model object, which is as it was afterwards.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from protocol.generation import DraftSettings
from workers.core import EngineCore
from workers.decoding.interface import BadAdapter, Method
from workers.decoding.registry import check_method, forks, load_adapters, make_method
from workers.model import linear
from workers.model.pages import PAGE_ROWS, pages_for
from workers.model.runner import ModelRunner
from workers.model.sampling import Sampling
from workers.request import Event, GenerationRequest
from workers.text import NoText

TOGETHER = 16  # rows of the input that are decoded in common forward passes
NOT_RETURNED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")

Decode = Callable[..., torch.Tensor | GenerateDecoderOnlyOutput]


def custom_generate(
    method: str = "lookahead", *, adapter: str | Path | None = None, streamer: Any = None, **draft: Any
) -> Decode:
    """What ``model.generate`` takes as ``custom_generate`` to decode with ``method``.

    Greedy answers are those of ``generate``; sampled ones have its distribution and repeat by ``torch.manual_seed``.

    Args:
        method: a name as ``polydecode worker --method`` takes it.
        adapter: trained weights, for methods that need them.
        streamer: one of transformers'. ``generate`` does not hand its own on to what it calls here.
        draft: sizes of its drafts, as in a request: ``nodes``, ``window``, ``level``, ``guesses``, …

    Raises:
        UnknownMethod, BadAdapter, ValueError: no such method, no weights for it, or a size that is none.
    """
    if forks(method):
        raise ValueError(f"{method!r}: generate decodes one thread; name what is to draft in it alone")
    kind = check_method(method)
    if kind and adapter is None:
        raise BadAdapter(f"method {method!r} needs trained weights: give adapter=PATH")
    paths = {kind: Path(adapter)} if adapter else {}
    settings = DraftSettings.model_validate(draft)

    def decode(
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_inputs: Any,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        _check(model, input_ids, generation_config)
        masks = model_inputs.get("attention_mask")
        masks = torch.ones_like(input_ids) if masks is None else masks  # it is dropped where nothing is padded
        rows = [
            _Row(input_ids, mask.bool(), number, logits_processor, stopping_criteria, generation_config)
            for number, mask in enumerate(masks)
        ]
        if streamer is not None:
            streamer.put(input_ids.cpu())
        with borrowed(model):
            decoder = make_method(method, load_adapters(paths, model))
            if settings.tree and settings.tree not in decoder.trees:
                raise ValueError(f"unknown tree {settings.tree!r}; known: {', '.join(decoder.trees) or 'none'}")
            for start in range(0, len(rows), TOGETHER):
                _decode(model, decoder, rows[start : start + TOGETHER], settings, streamer)
        if streamer is not None:
            streamer.end()
        sequences = _padded(input_ids, rows, generation_config)
        wrapped = generation_config.return_dict_in_generate
        return GenerateDecoderOnlyOutput(sequences=sequences) if wrapped else sequences  # type: ignore[arg-type]

    return decode


@contextmanager
def borrowed(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model may be an engine's; afterwards it is as it was."""
    implementation, training = model.config._attn_implementation, model.training
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
        linear.uninstall(model)
        model.train(training)


class _Row:
    """One row of the input, without its padding, and how ``generate`` treats it.

    Attributes:
        new: tokens added so far.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        number: int,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
    ) -> None:
        self.prompt: list[int] = input_ids[number][mask].tolist()
        self.new: list[int] = []
        self._padding: list[int] = input_ids[number][~mask].tolist()  # processors and criteria count it
        self._inputs, self._number = input_ids, number
        self._processors = processors
        self._criteria = criteria
        self._samples = bool(config.do_sample)
        self._new_tokens = config.max_length - input_ids.shape[1]

    def request(self, method: str, draft: DraftSettings) -> GenerationRequest:
        """What the core is asked."""
        seed = int(torch.randint(1 << 62, ()))
        sampling = Sampling(temperature=float(self._samples), processor=self._process, seed=seed)
        return GenerationRequest(
            request_id="generate",
            prompt=self.prompt,
            sampling=sampling,
            max_new_tokens=self._new_tokens,
            method=method,
            stop_token_ids=frozenset(),
            stop_when=self._stops,
            draft=draft,
        )

    def _process(self, token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        scores = logits.expand(len(self._inputs), -1)
        processed: torch.Tensor = self._processors(self._batch(token_ids), scores)  # type: ignore[arg-type]
        return processed[self._number]

    def _stops(self, token_ids: list[int]) -> bool:
        return bool(self._criteria(self._batch(token_ids), None)[self._number])  # there are no scores here

    def _batch(self, token_ids: list[int]) -> torch.Tensor:
        """This row at every place of a batch as large as the input: some processors are made for its size."""
        row = torch.tensor([self._padding + token_ids], device=self._inputs.device)
        return row.expand(len(self._inputs), -1)


def _check(model: PreTrainedModel, input_ids: torch.Tensor, config: GenerationConfig) -> None:
    if model.config.is_encoder_decoder or not input_ids.numel():
        raise ValueError("custom_generate decodes token ids with a decoder-only model; this is another kind of input")
    if (config.num_beams or 1) > 1:
        raise ValueError(f"custom_generate follows one path per row: num_beams must be 1, not {config.num_beams}")
    if wanted := [name for name in NOT_RETURNED if getattr(config, name)]:
        raise ValueError(f"custom_generate returns sequences alone: {wanted[0]} is not supported")


def _decode(model: PreTrainedModel, method: Method, rows: list[_Row], draft: DraftSettings, streamer: Any) -> None:
    requests = [row.request(method.name, draft) for row in rows]
    pages = sum(pages_for(len(request.prompt) + request.max_new_tokens) + 2 for request in requests)
    runner = ModelRunner(model, kv_tokens=pages * PAGE_ROWS)
    core = EngineCore(runner, NoText(), {method.name: method}, max_requests=len(rows), describe=lambda request: None)
    failures: list[Exception] = []

    def sink(row: _Row) -> Callable[[Event], None]:
        def take(event: Event) -> None:
            tokens = event.step.threads[0].token_ids if event.step else []
            row.new += tokens
            if event.error:
                failures.append(event.error)
            if streamer is not None and tokens:
                streamer.put(torch.tensor(tokens))

        return take

    for row, request in zip(rows, requests, strict=True):
        core.scheduler.add(core.open(request, sink(row)))
    while core.step():
        if failures:
            raise failures[0]


def _padded(input_ids: torch.Tensor, rows: list[_Row], config: GenerationConfig) -> torch.Tensor:
    """int64[B, L + longest answer], as ``generate`` returns it."""
    longest = max(len(row.new) for row in rows)
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    new = [row.new + [pad] * (longest - len(row.new)) for row in rows]
    return torch.cat([input_ids, torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device)], dim=1)
