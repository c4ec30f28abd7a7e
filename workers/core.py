"""One step of the engine: draft, one forward pass, verify, commit, observe, report."""

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from transformers import PreTrainedTokenizerBase

from protocol.errors import ErrorCode, RequestError
from protocol.trace import ThreadStep, TraceHeader
from workers.decoding.interface import Budget, Method, Outcome
from workers.decoding.registry import BASELINE, drafting_method
from workers.metrics import EngineCounters
from workers.model.batch import Run, StepBatch
from workers.model.pages import distinct_rows
from workers.model.runner import ModelRunner, StepOutput
from workers.model.sampling import Row, choose, top_logprobs, typical
from workers.model.tree import EMPTY_TREE, Needs, TokenTree
from workers.model.verification import ROOT, Walk, Walker, candidate_rows, path_tokens
from workers.pace import Pacer, Part
from workers.request import Accepted, Event, GenerationRequest, Request, Sink, Thread, TokenReport
from workers.scheduler import Scheduler, Turn
from workers.text import NoText
from workers.tuning import Tuner

logger = logging.getLogger(__name__)

POSTERIOR_THRESHOLD, POSTERIOR_ALPHA = 0.09, 0.3  # Medusa's defaults


@dataclass(frozen=True)
class Place:
    """Where a turn's rows lie in the step: its run from ``start`` on, its tree from ``tree_start`` on.

    ``first`` is the position in the thread's path at which the run starts.
    """

    first: int
    start: int
    tree_start: int

    @property
    def root(self) -> int:
        return self.tree_start - 1

    def row(self, node: int) -> int:
        """The step row of a tree row, or of ROOT."""
        return self.tree_start + node if node != ROOT else self.root


@dataclass
class Step:
    """A computed step, not yet committed. Lists run parallel to ``turns``; a walk is None for a prompt chunk."""

    turns: list[Turn]
    trees: list[TokenTree]
    places: list[Place]
    batch: StepBatch
    output: StepOutput
    logit_index: dict[int, int]
    walks: list[Walk | None]
    drafting_ms: float
    forward_ms: float = 0.0


class EngineCore:
    """The engine without its thread: requests in, steps, events out through each request's sink."""

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: PreTrainedTokenizerBase | NoText,
        methods: Mapping[str, Method],
        *,
        max_requests: int,
        describe: Callable[[Request], TraceHeader | None],
        on_close: Callable[[Request], None] = lambda request: None,
    ) -> None:
        """``describe`` makes a trace's header; ``on_close`` hears of every request that is gone, however it ended."""
        self.runner = runner
        self.scheduler = Scheduler(runner, max_requests=max_requests)
        self.tuner = Tuner()
        self.pacer = Pacer()
        self.counters = EngineCounters()
        self._tokenizer = tokenizer
        self._methods = methods
        self._describe = describe
        self._on_close = on_close

    def open(self, spec: GenerationRequest, sink: Sink) -> Request:
        """A request that is not queued yet; any thread may call this."""
        return Request(spec, self._tokenizer, sink)

    def step(self) -> bool:
        """Run one step; False if there was nothing to do."""
        started = perf_counter()
        for request in [request for request in self.scheduler.requests if request.cancelled]:
            self.counters.cancelled += 1
            self._close(request)
        turns = self.scheduler.plan()
        if not turns:
            return False
        self._run(turns)
        self.counters.step_s += perf_counter() - started
        return True

    def _run(self, turns: list[Turn]) -> None:
        """Compute and apply a step; if it fails, find the requests that make it fail and end only those."""
        try:
            step = self._compute(turns)
        except Exception as error:
            requests = _requests_of(turns)
            if len(requests) == 1:
                self.abandon(requests[0], error)
                return
            for request in requests:
                self._run([turn for turn in turns if turn.thread.request is request])
            return
        self._apply(step)

    # ---- compute: nothing below changes a request ------------------------------------------------------------------

    def _compute(self, turns: list[Turn]) -> Step:
        started = perf_counter()
        trees = self._drafts(turns)
        drafting_ms = 1000 * (perf_counter() - started)
        runs = [self._run_of(turn, tree) for turn, tree in zip(turns, trees, strict=True)]
        batch = self.runner.prepare(runs)
        places = [
            Place(turn.thread.table.length, segment.start, segment.start + turn.rows)
            for segment, turn in zip(batch.segments, turns, strict=True)
        ]
        output = self.runner.forward(batch)
        index = {row: position for position, row in enumerate(batch.logit_rows)}
        step = Step(turns, trees, places, batch, output, index, [], drafting_ms)
        step.walks = self._verify(step)
        step.forward_ms = output.watch.ms()  # only now: on a GPU the tokens were waited for anyway
        return step

    def _drafts(self, turns: list[Turn]) -> list[TokenTree]:
        """A tree for every turn that completes; empty where no page is free for what could be accepted."""
        trees = [EMPTY_TREE] * len(turns)
        completing = [index for index, turn in enumerate(turns) if turn.completes]
        budget = self._budget(turns, completing)
        for name, method in self._methods.items():
            mine = [index for index in completing if turns[index].thread.request.spec.method == name]
            if not mine:
                continue
            drafted = method.draft([turns[index].thread for index in mine], budget)
            for index, tree in zip(mine, drafted, strict=True):
                if self.scheduler.reserve_draft(turns[index].thread, tree.max_accepted):
                    trees[index] = tree
        return trees

    def _budget(self, turns: list[Turn], completing: list[int]) -> Budget:
        fixed = sum(turn.rows for turn in turns)
        drafting = [turns[index].thread for index in completing]
        return self.tuner.budget(
            (self.runner.step_rows - fixed) // max(1, len(completing)),
            fixed=fixed,
            emitting=len(completing),
            drafting=sum(drafting_method(thread.request.spec.method) != BASELINE for thread in drafting),
            context=sum(len(thread.token_ids) for thread in drafting) / max(1, len(drafting)),
        )

    def _run_of(self, turn: Turn, tree: TokenTree) -> Run:
        thread = turn.thread
        reads_prompt = turn.thread.table.length + 1 < thread.prompt_length
        scores_prompt = thread.request.spec.wants_prompt_logprobs and reads_prompt
        needs = Needs.LOGITS if scores_prompt else Needs.NOTHING
        last = self._methods[thread.request.spec.method].root_needs | Needs.LOGITS if turn.completes else needs
        return Run(turn.token_ids, thread.table, tree, last_needs=last, needs=needs)

    def _verify(self, step: Step) -> list[Walk | None]:
        """All threads together, a token further in each round."""
        walkers = {index: self._walker(step, index) for index, turn in enumerate(step.turns) if turn.completes}
        while going := {index: walker for index, walker in walkers.items() if not walker.done}:
            wanted = [step.logit_index[step.places[index].row(walker.node)] for index, walker in going.items()]
            rows = [_row(step.turns[index].thread, walker.walk.token_ids) for index, walker in going.items()]
            for walker, token in zip(going.values(), choose(_select(step.output.logits, wanted), rows), strict=True):
                walker.take(token)
        return [walkers[index].walk if index in walkers else None for index in range(len(step.turns))]

    def _walker(self, step: Step, index: int) -> Walker:
        thread, tree = step.turns[index].thread, step.trees[index]
        spec = thread.request.spec
        walker = Walker(tree, limit=thread.remaining, terminal=spec.terminal)
        if spec.is_exact or not tree:
            return walker
        drafted = candidate_rows(tree)
        parents = [tree.parents[row] for row in drafted]
        scores = typical(
            step.output.logits[[step.logit_index[step.places[index].row(parent)] for parent in parents]],
            [_row(thread, path_tokens(tree, parent)) for parent in parents],
            [tree.token_ids[row] for row in drafted],
            threshold=spec.draft.posterior_threshold or POSTERIOR_THRESHOLD,
            alpha=spec.draft.posterior_alpha or POSTERIOR_ALPHA,
        )
        walker.accept({row: score for row, score in zip(drafted, scores, strict=True) if score is not None})
        return walker

    # ---- apply: the step happened ----------------------------------------------------------------------------------

    def _apply(self, step: Step) -> None:
        self._commit(step)
        self.counters.forward(step.forward_ms, len(step.batch))
        self._keep_pace(step)
        observed: dict[str, list[tuple[Thread, Outcome]]] = {}
        for request in _requests_of(step.turns):
            mine = [index for index, turn in enumerate(step.turns) if turn.thread.request is request]
            try:
                outcomes = self._advance(request, step, mine)
                observed.setdefault(request.spec.method, []).extend(outcomes)
            except Exception as error:
                self.abandon(request, error)
        for name, pairs in observed.items():
            alive = [(thread, outcome) for thread, outcome in pairs if not thread.finished]
            if alive:
                threads, results = [thread for thread, _ in alive], [outcome for _, outcome in alive]
                self._methods[name].observe(threads, results)
                self.tuner.observe(threads, results, step.drafting_ms)

    def _keep_pace(self, step: Step) -> None:
        parts: list[Part] = []
        context = 0
        for turn, tree, taken in zip(step.turns, step.trees, step.walks, strict=True):
            if taken:
                request = turn.thread.request
                parts.append(Part(request.spec.method, request.pace, len(tree), len(taken.token_ids)))
                context += len(turn.thread.token_ids)
        if parts:
            fixed = sum(turn.rows for turn in step.turns)
            self.pacer.record(parts, fixed=fixed, context=context / len(parts), drafting_ms=step.drafting_ms)

    def _commit(self, step: Step) -> None:
        """Count the runs' rows, and move accepted tree rows to pages; the last emitted token has no row yet."""
        rows: list[int] = []
        slots: list[torch.Tensor] = []
        for turn, place, taken in zip(step.turns, step.places, step.walks, strict=True):
            kept = taken.rows[: len(taken.token_ids) - 1] if taken else []
            table = turn.thread.table
            table.advance(turn.rows + len(kept))
            if kept:
                rows += [place.row(node) for node in kept]
                slots.append(table.slots(table.length - len(kept), table.length))
        if rows:
            self.runner.commit(rows, torch.cat(slots))

    def _advance(self, request: Request, step: Step, mine: list[int]) -> list[tuple[Thread, Outcome]]:
        """Append what a request's threads emitted, report it, and end what ends."""
        thread_steps: list[ThreadStep] = []
        outcomes: list[tuple[Thread, Outcome]] = []
        for index in mine:
            turn, taken = step.turns[index], step.walks[index]
            self._score_prompt(request, step, index)
            if taken is None:
                continue
            if turn.thread.finished:  # the text ended before it in this very step
                continue
            accepted = turn.thread.accept(taken.token_ids)
            reports = self._token_reports(request, step, index)[: len(accepted.tokens)]
            request.reading.push(turn.thread.number, accepted.text, _readable(turn.thread, reports))
            self._branch(turn.thread)
            rows = taken.rows[: len(accepted.tokens)]
            thread_steps.append(_thread_step(turn.thread, step.trees[index], rows, accepted, reports))
            outcomes.append((turn.thread, self._outcome(step, index, rows, accepted.tokens)))
        width = sum(step.turns[index].rows + len(step.trees[index]) for index in mine)
        if thread_steps:
            self._report(request, step, thread_steps, width)
        else:
            request.prefill_ms += step.forward_ms
            request.prefill_steps += 1
        return outcomes

    def _branch(self, thread: Thread) -> None:
        """What a thread's last token means to the others: a child, or the end of the text behind it."""
        request = thread.request
        if thread.finished:
            if thread.cut:
                for number in request.reading.cut(thread.number):
                    request.threads[number].finish_reason = "stop"
            request.reading.finish(thread.number)
        elif thread.forks and request.spec.forking:
            self.scheduler.open_thread(thread, [request.spec.forking.tokens.child])

    def _shown(self, request: Request) -> tuple[str, list[TokenReport]]:
        """What became readable; the request ends where a stop string does, or with the last of its tokens."""
        text, reports = request.read()
        limit = request.spec.max_total_tokens
        if limit and request.completion_tokens >= limit and not request.finished:
            request.end("length")
            rest, more = request.read()
            return text + rest, reports + more
        return text, reports

    def _report(self, request: Request, step: Step, threads: list[ThreadStep], width: int) -> None:
        tables = [thread.table for thread in request.threads]
        kv = tables[0].length if len(tables) == 1 else distinct_rows(tables)
        trace = request.record(threads, forward_ms=step.forward_ms, width=width, batch_width=len(step.batch), kv=kv)
        self.counters.tokens(trace)
        text, reports = self._shown(request)
        for told in threads:  # a thread may have ended since, with the text
            told.finish_reason = request.threads[told.thread].finish_reason
        for thread in request.threads:
            if thread.finished:
                self.scheduler.close_thread(thread)
        first = request.first_token_at is None
        if first:
            request.first_token_at = perf_counter()
        done = request.finished
        if done:
            self._close(request)
            self.counters.finished += 1
        request.sink(
            Event(
                text=(request.spec.echo if first else "") + text,
                step=trace,
                tokens=tuple(request.prompt_reports + reports if first else reports),
                prompt_tokens=len(request.spec.prompt),
                completion_tokens=request.completion_tokens,
                header=self._describe(request) if first else None,
                summary=request.summary() if done else None,
                finish_reason=request.finish_reason() if done else None,
            )
        )

    def _outcome(self, step: Step, index: int, rows: list[int], tokens: list[int]) -> Outcome:
        first, behind = step.places[index].root, step.places[index].tree_start + len(step.trees[index])
        return Outcome(
            tree=step.trees[index],
            rows=rows,
            token_ids=tokens,
            step_logits=step.output.logits,
            step_hidden=step.output.hidden,
            logit_rows=_between(step.batch.logit_rows, first, behind),
            hidden_rows=_between(step.batch.hidden_rows, first, behind),
        )

    def _token_reports(self, request: Request, step: Step, index: int) -> list[TokenReport]:
        """Logprobs of a turn's emitted tokens, before text cuts."""
        taken = step.walks[index]
        if request.spec.logprobs is None or taken is None:
            return []
        nodes = [ROOT, *taken.rows][: len(taken.token_ids)]
        rows = [step.logit_index[step.places[index].row(node)] for node in nodes]
        scored = top_logprobs(step.output.logits[rows], taken.token_ids, request.spec.logprobs)
        return [TokenReport(token, score) for token, score in zip(taken.token_ids, scored, strict=True)]

    def _score_prompt(self, request: Request, step: Step, index: int) -> None:
        """Logprobs of the prompt's tokens that this turn's rows predict; a preempted prompt is not scored twice."""
        turn, place = step.turns[index], step.places[index]
        if not request.spec.wants_prompt_logprobs or request.spec.logprobs is None:
            return
        prompt, reports = request.spec.prompt, request.prompt_reports
        if not reports:
            reports.append(TokenReport(prompt[0], None))
        targets = range(max(place.first + 1, len(reports)), min(place.first + turn.rows + 1, len(prompt)))
        if targets:
            rows = [step.logit_index[place.start + target - 1 - place.first] for target in targets]
            tokens = [prompt[target] for target in targets]
            scored = top_logprobs(step.output.logits[rows], tokens, request.spec.logprobs)
            reports += [TokenReport(token, score) for token, score in zip(tokens, scored, strict=True)]

    def abandon(self, request: Request, error: Exception) -> None:
        """End one request with an error; everything it held is free afterwards."""
        if not isinstance(error, RequestError):
            logger.error("request %s failed", request.spec.request_id, exc_info=error)
        self._close(request)
        self.counters.failed += 1
        request.sink(Event(error=_readable_error(error)))

    def _close(self, request: Request) -> None:
        """The one place where a request ends, whatever ended it."""
        self.scheduler.remove(request)
        self._on_close(request)


def _readable_error(error: Exception) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return RequestError(ErrorCode.CUDA_OUT_OF_MEMORY, "the GPU ran out of memory: lower --kv-tokens")
    line = (str(error).strip().splitlines() or [""])[0]
    return RequestError(ErrorCode.INTERNAL_ERROR, f"decoding failed: {type(error).__name__}: {line}")


def _requests_of(turns: Iterable[Turn]) -> list[Request]:
    return list({id(turn.thread.request): turn.thread.request for turn in turns}.values())


def _row(thread: Thread, drafted: list[int]) -> Row:
    prompt = thread.request.spec.prompt
    if not thread.sampling.uses_history:  # positions are all that is needed of them: spare the copy
        return Row(thread.sampling, thread.path, thread.token_ids, (), drafted)
    return Row(thread.sampling, thread.path, prompt, thread.token_ids[len(prompt) :], drafted)


def _select(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return logits if rows == list(range(len(logits))) else logits[rows]


def _between(step_rows: Sequence[int], start: int, stop: int) -> range:
    """Where the ascending ``step_rows`` lie in [start, stop)."""
    return range(bisect_left(step_rows, start), bisect_left(step_rows, stop))


def _readable(thread: Thread, reports: list[TokenReport]) -> list[TokenReport]:
    """Those of tokens that stand in the text, and of the one that ends all of it."""
    spec = thread.request.spec
    hidden = {spec.fork} if thread.parent is None else {spec.fork, *spec.stop_token_ids}
    return [report for report in reports if report.token not in hidden]


def _thread_step(
    thread: Thread, tree: TokenTree, rows: list[int], accepted: Accepted, reports: list[TokenReport]
) -> ThreadStep:
    full = thread.request.spec.trace == "full"
    return ThreadStep(
        thread=thread.number,
        parent=None if thread.parent is None else thread.parent.number,
        drafted=len(candidate_rows(tree)),
        accepted=len(rows),
        token_ids=accepted.tokens,
        text=accepted.shown,
        finish_reason=thread.finish_reason,
        token_logprobs=[report.logprobs.logprob for report in reports if report.logprobs] or None,
        draft_token_ids=[tree.token_ids[row] for row in candidate_rows(tree)] if full else None,
    )
