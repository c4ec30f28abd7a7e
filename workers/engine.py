"""The engine: one model on one device, one thread that runs it, any number of requests."""

import gc
import logging
import platform
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter
from typing import Any, TypeVar

import torch
import transformers
from transformers import PreTrainedModel

from protocol.errors import ErrorCode, RequestError
from protocol.generation import DraftSettings, GenerateParams
from protocol.trace import TraceHeader
from protocol.wire import parse_object
from workers.core import EngineCore
from workers.decoding.interface import BadAdapter
from workers.decoding.registry import (
    BASELINE,
    FORKING,
    UnknownMethod,
    canonical,
    check_method,
    forks,
    load_adapters,
    make_method,
)
from workers.forking import ControlTokens, find_control_tokens
from workers.metrics import EngineCounters, EngineStatus
from workers.model.checkpoint import Checkpoint, ModelLoadError, first_line, load_checkpoint, stop_token_ids
from workers.model.curve import LatencyCurve, latency_curve
from workers.model.devices import device_name, find_device, find_dtype
from workers.model.pages import OutOfPages
from workers.model.runner import ModelRunner
from workers.prompts import PromptRenderer
from workers.request import Event, Request, Sink
from workers.resolve import Limits, check_draft, resolve

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

DEFAULT_REQUESTS = 16
DEFAULT_QUEUE = 256
PUBLISHED_FAMILY = "vicuna"  # APAR's checkpoints are vicunas, which their name (apar-7b) does not tell FastChat
UNTRACED = ("banned", "banned_after", "processor")  # of a request's sampling


class Engine:
    """Load a model once, then generate from any number of threads.

    Requests of all callers share forward passes. Close the engine (or use it in a ``with`` block) to stop its thread.
    """

    def __init__(
        self,
        load: Callable[[], Checkpoint],
        *,
        methods: Sequence[str] = (BASELINE,),
        kv_tokens: int | None = None,
        max_requests: int = DEFAULT_REQUESTS,
        max_queue: int = DEFAULT_QUEUE,
        conv_template: str | None = None,
        draft: DraftSettings | None = None,
        tune: bool = True,
        adapters: Mapping[str, Path] | None = None,
    ) -> None:
        """See :meth:`load`. ``load`` is called on the engine's thread."""
        self.methods = tuple(dict.fromkeys([*map(canonical, methods), BASELINE]))
        self._draft = draft or DraftSettings()
        self._tunes = tune
        self._adapter_paths = adapters or {}
        self._max_requests = max_requests
        self._max_open = max_requests + max_queue
        self._open: set[int] = set()
        self._jobs: list[Callable[[], None]] = []
        self._wake = threading.Condition()
        self._closed = False
        self._last_step = perf_counter()
        ready: Future[None] = Future()

        def run() -> None:
            # Loading happens here as well: a second thread that computes would get a pool of OpenMP threads of its own,
            # and with more of them than cores each parallel region waits for a wake-up (measured: half the speed).
            try:
                self._set_up(load, kv_tokens, conv_template)
            except BaseException as error:
                ready.set_exception(error)
                return
            gc.collect()
            gc.freeze()  # the model's many objects live for ever: do not search them at every collection
            ready.set_result(None)
            self._loop()

        self._thread = threading.Thread(target=run, name="engine", daemon=True)
        self._thread.start()
        ready.result()

    def _set_up(self, load: Callable[[], Checkpoint], kv_tokens: int | None, conv_template: str | None) -> None:
        try:
            needed = {check_method(name) for name in self.methods} - {""}
            checkpoint = load()
            paths = {kind: path for kind in needed if (path := checkpoint.adapter(kind))} | dict(self._adapter_paths)
            self.adapters = load_adapters(paths, checkpoint.model)
            decoders = {name: make_method(name, self.adapters) for name in self.methods}
            self.control = self._control_tokens(checkpoint)
            named = PUBLISHED_FAMILY if self.control and self.control.published else checkpoint.name
            self.renderer = PromptRenderer(checkpoint.tokenizer, named, conv_template)
        except (UnknownMethod, BadAdapter, ValueError) as error:
            raise ModelLoadError(str(error)) from error
        self.name = checkpoint.name
        self.tokenizer = checkpoint.tokenizer
        self.quantization = checkpoint.quantization
        self.curve: LatencyCurve | None = None
        runner = _runner(checkpoint.model, kv_tokens)
        self.context_length = runner.context_length
        self.kv_tokens = runner.kv_tokens
        trees = {name: decoder.trees for name, decoder in decoders.items()}
        self._limits = Limits(
            runner.context_length,
            runner.vocabulary,
            stop_token_ids(checkpoint),
            self.methods,
            self._draft,
            trees,
            self.control,
            whitespace="published" if self.control and self.control.published else "plain",
        )
        try:
            check_draft(self._draft, runner.context_length, list(chain.from_iterable(trees.values())))
        except RequestError as error:
            raise ModelLoadError(str(error)) from error
        self._core = EngineCore(
            runner,
            checkpoint.tokenizer,
            decoders,
            max_requests=self._max_requests,
            describe=self._describe,
            on_close=self._forget,
        )

    def _control_tokens(self, checkpoint: Checkpoint) -> ControlTokens | None:
        control = find_control_tokens(checkpoint.tokenizer, checkpoint.model.config.get_text_config().vocab_size)
        if control is None and (forking := next(filter(forks, self.methods), None)):
            raise ValueError(f"method {forking!r} needs a model that was trained to fork: its tokenizer has no [Fork]")
        return control

    @classmethod
    def load(
        cls,
        model_path: str,
        *,
        method: str | Sequence[str] = BASELINE,
        device: str | None = None,
        dtype: str | None = None,
        quantization: str | None = None,
        adapters: Mapping[str, Path] | None = None,
        **options: Any,
    ) -> "Engine":
        """Load an embedded model's name, a folder, a GGUF file or a hub id.

        Args:
            model_path: what to load.
            method: the methods to serve; the first is the default of :meth:`generate`.
            device: torch's name; by default the first GPU, else the CPU.
            dtype: ``float32``, ``bfloat16`` or ``float16``; by default float32 on a CPU and bfloat16 on a GPU.
            quantization: None, or ``int8`` for the weights of all products.
            adapters: kind → path of trained weights; by default those that come with the model. ``apar`` changes the
                model's own weights.
            options: ``kv_tokens`` (rows of KV; by default from free memory), ``max_requests`` (running at a time),
                ``max_queue`` (waiting), ``conv_template`` (one of FastChat's), ``draft`` (sizes that requests may
                override), ``tune`` (False: no size is chosen by measured costs).

        Raises:
            ModelLoadError: the model cannot be served; one line.
        """
        try:
            place = find_device(device)
            kind = find_dtype(dtype, place)
        except ValueError as error:
            raise ModelLoadError(str(error)) from error
        methods = [method] if isinstance(method, str) else method

        trained = dict(adapters or {})
        merged = trained.pop(FORKING, None)

        def load() -> Checkpoint:
            return load_checkpoint(model_path, dtype=kind, device=place, quantization=quantization, adapter=merged)

        return cls(load, methods=methods, adapters=trained, **options)

    # ---- requests --------------------------------------------------------------------------------------------------

    def generate(
        self, prompt: str | list[dict[str, str]], *, method: str | None = None, **params: Any
    ) -> Iterator[Event]:
        """Answer messages, or continue text; yields an event a step. Closing the iterator cancels the request.

        ``params`` are the worker's (``max_new_tokens``, ``temperature``, ``top_p``, ``seed``, ``stop``, ``trace``, …).

        Raises:
            RequestError: the request is refused, or fails.
        """
        source = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
        content = {"echo": False, "method": method or self.methods[0], **source, **params}
        events: SimpleQueue[Event] = SimpleQueue()
        request = self.submit(parse_object(GenerateParams, content), events.put)
        try:
            while True:
                event = events.get()
                if event.error:
                    raise event.error
                yield event
                if event.last:
                    return
        finally:
            self.cancel(request)

    def submit(
        self,
        params: GenerateParams,
        sink: Sink,
        *,
        request_id: str | None = None,
        defaults: dict[str, str] | None = None,
    ) -> Request:
        """Queue a request; ``sink`` gets its events on the engine's thread. ``defaults``: served names → methods.

        Raises:
            RequestError: refused, with the reason in one line.
        """
        spec = resolve(
            params,
            renderer=self.renderer,
            limits=self._limits,
            request_id=request_id or uuid.uuid4().hex,
            defaults=defaults or {self.name: self.methods[0]},
        )
        request = self._core.open(spec, sink)
        with self._wake:
            if self._closed:
                raise RequestError(ErrorCode.ENGINE_OVERLOADED, "the worker is shutting down")
            if len(self._open) >= self._max_open:
                message = f"the worker is full: {len(self._open)} requests are running or waiting; try again later"
                raise RequestError(ErrorCode.ENGINE_OVERLOADED, message)
            self._open.add(id(request))
            self._jobs.append(lambda: self._core.scheduler.add(request))
            self._wake.notify()
        return request

    def cancel(self, request: Request) -> None:
        """End a request before the next step; harmless if it has ended."""
        request.cancelled = True

    # ---- other services of the model -------------------------------------------------------------------------------

    def count_tokens(self, text: str) -> int:
        """Tokens of a prompt."""
        return len(self.renderer.encode(text).token_ids)

    def embed(self, text: str) -> "Future[tuple[list[float], int]]":
        """A unit vector (mean of the last hidden states) and the token count, computed between two steps."""
        token_ids = self.renderer.encode(text).token_ids
        if not 0 < len(token_ids) <= self.context_length:
            message = f"input: {len(token_ids)} tokens; must be 1 to {self.context_length}"
            raise RequestError(ErrorCode.CONTEXT_OVERFLOW, message)
        return self.between_steps(lambda runner: (runner.embed(token_ids).tolist(), len(token_ids)))

    def between_steps(self, work: Callable[[ModelRunner], Result]) -> "Future[Result]":
        """Run ``work`` on the engine's thread between two steps, for whatever else needs the model."""
        future: Future[Result] = Future()

        def job() -> None:
            try:
                future.set_result(work(self._core.runner))
            except Exception as error:
                future.set_exception(error)

        with self._wake:
            if self._closed:
                future.set_exception(RequestError(ErrorCode.ENGINE_OVERLOADED, "the worker is shutting down"))
                return future
            self._jobs.append(job)
            self._wake.notify()
        return future

    def measure(self, *, fresh: bool = False) -> LatencyCurve:
        """Measure the latency curve between steps, or find it in the cache unless ``fresh``; keeps it as ``curve``.

        Raises:
            RequestError: no pages are free for it.
        """
        try:
            self.curve = latency_curve(lambda work: self.between_steps(work).result(), fresh=fresh)
        except OutOfPages as error:
            raise RequestError(ErrorCode.ENGINE_OVERLOADED, "no pages are free to measure with") from error
        self._core.pacer.curve = self.curve
        if self._tunes:
            self._core.tuner.curve = self.curve
        return self.curve

    @property
    def counters(self) -> EngineCounters:
        """Totals since the start."""
        return self._core.counters

    def status(self) -> EngineStatus:
        """The load right now."""
        scheduler, pool = self._core.scheduler, self._core.runner.pool
        running = scheduler.running
        return EngineStatus(running, len(self._open) - running, pool.free, pool.total, scheduler.preemptions)

    def pace(self) -> dict[str, float]:
        """Speed of the methods that have been used over vanilla's, by the latency curve."""
        ratios = {name: pace.ratio for name, pace in self._core.pacer.methods.items()}
        return {name: ratio for name, ratio in ratios.items() if ratio is not None}

    def last_progress_s(self) -> float | None:
        """Seconds since the last step; None while there is nothing to do."""
        return perf_counter() - self._last_step if self._open else None

    def memory(self) -> dict[str, int]:
        """Bytes of the weights, of copies of them packed for the kernels, of the KV storage, and of each adapter."""
        return self._core.runner.memory() | {kind: adapter.nbytes for kind, adapter in self.adapters.items()}

    @property
    def device(self) -> torch.device:
        return self._core.runner.device

    @property
    def dtype(self) -> str:
        return str(self._core.runner.model.dtype).removeprefix("torch.")

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    def description(self) -> str:
        """One line for the log: what is served, on what, with how much memory."""
        memory = self.memory()
        adapters = "".join(f", {kind} {memory[kind]:,} bytes" for kind in self.adapters)
        return (
            f"{self.name} on {device_name(self.device)}, {self.dtype}, methods {', '.join(self.methods)}: "
            f"weights {memory['weights'] / 1e6:.0f} MB, packed copies {memory['packed'] / 1e6:.0f} MB, "
            f"KV {memory['kv'] / 1e6:.0f} MB for {self.kv_tokens} tokens{adapters}"
        )

    def close(self) -> None:
        """Stop the thread after its step; requests still open end with an error."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # ---- the engine's thread ---------------------------------------------------------------------------------------

    def _loop(self) -> None:
        scheduler = self._core.scheduler
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._jobs or scheduler.requests)
                if self._closed:
                    break
                jobs, self._jobs = self._jobs, []
            for job in jobs:
                job()
            self._last_step = perf_counter()
            try:
                self._core.step()
            except Exception as error:  # a fault of ours: it must not outlive the requests it met
                for request in list(scheduler.requests):
                    self._core.abandon(request, error)
        for job in self._jobs:
            job()
        for request in list(scheduler.requests):
            self._core.abandon(request, RequestError(ErrorCode.ENGINE_OVERLOADED, "the worker is shutting down"))

    def _forget(self, request: Request) -> None:
        with self._wake:
            self._open.discard(id(request))

    def _describe(self, request: Request) -> TraceHeader:
        spec = request.spec
        sampling = spec.sampling
        return TraceHeader(
            request_id=spec.request_id,
            model=self.name,
            method=spec.method,
            exact=spec.is_exact,
            parameters={
                **{name: value for name, value in vars(sampling).items() if name not in UNTRACED},
                "max_new_tokens": spec.max_new_tokens,
                "stop": list(spec.stop_strings),
                "draft": spec.draft.model_dump(exclude_none=True),
            },
            device=device_name(self.device),
            dtype=self.dtype,
            quantization=asdict(self.quantization) if self.quantization else None,
            versions={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            prompt_tokens=len(spec.prompt),
            prefill_ms=request.prefill_ms,
            prefill_steps=request.prefill_steps,
            prompt_token_ids=spec.prompt if spec.trace == "full" else None,
            control_tokens=(self.control.fork, self.control.child) if self.control and forks(spec.method) else None,
            whitespace=spec.whitespace,
        )


def _runner(model: PreTrainedModel, kv_tokens: int | None) -> ModelRunner:
    try:
        return ModelRunner(model, kv_tokens=kv_tokens)
    except ModelLoadError:
        raise
    except Exception as error:  # models that are built in another way fail anywhere in their code, or in ours
        raise ModelLoadError(f"{type(model).__name__} cannot be served: {first_line(error)}") from error
