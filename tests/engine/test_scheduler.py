"""Threads, pages and turns: who runs, who waits, who gives way; stepped by hand, without the engine's thread."""

import random
from collections.abc import Callable, Sequence

import pytest

from protocol.trace import TraceHeader
from tests.support.oracle import assert_same_answer, greedy
from tests.support.tiny import tiny_checkpoint
from workers.core import EngineCore
from workers.decoding.interface import Budget, DraftThread, Method, Outcome
from workers.decoding.vanilla import Vanilla
from workers.model.pages import PAGE_ROWS
from workers.model.runner import ModelRunner
from workers.model.sampling import Sampling
from workers.model.tree import Needs, TokenTree
from workers.request import Event, GenerationRequest, Request

EOS = 2


class Guesser(Method):
    """Drafts random trees, half of whose branches follow the known answer; learns nothing, checks what it is told."""

    name = "guess"
    root_needs = Needs.LOGITS | Needs.HIDDEN

    def __init__(self) -> None:
        self.known: dict[tuple[int, ...], list[int]] = {}
        self.random = random.Random(0)
        self.accepted = 0

    def draft(self, threads: Sequence[DraftThread], budget: Budget) -> list[TokenTree]:
        return [self._tree(thread, min(budget.rows, 9)) for thread in threads]

    def _tree(self, thread: DraftThread, size: int) -> TokenTree:
        prompt = tuple(thread.token_ids[: thread.prompt_length])
        coming = self.known[prompt][len(thread.token_ids) - thread.prompt_length :][: self.random.randint(0, 4)]
        ids, parents = list(coming), list(range(-1, len(coming) - 1))
        while len(ids) < size:
            ids.append(self.random.randrange(3, 300))
            parents.append(self.random.randint(-1, len(ids) - 2))
        candidate = [row < len(coming) or self.random.random() < 0.7 for row in range(size)]
        return TokenTree.of(ids, parents, candidate=candidate, needs=[Needs.HIDDEN] * size)

    def observe(self, threads: Sequence[DraftThread], outcomes: Sequence[Outcome]) -> None:
        for thread, outcome in zip(threads, outcomes, strict=True):
            assert thread.token_ids[-len(outcome.token_ids) :] == outcome.token_ids
            assert len(outcome.hidden) == 1 + len(outcome.tree)
            self.accepted += len(outcome.rows)


def make_core(kv_tokens: int = 2048, max_requests: int = 16, methods: dict[str, Method] | None = None) -> EngineCore:
    checkpoint = tiny_checkpoint()
    runner = ModelRunner(checkpoint.model, kv_tokens=kv_tokens, step_rows=128)
    return EngineCore(
        runner,
        checkpoint.tokenizer,
        methods or {"vanilla": Vanilla()},
        max_requests=max_requests,
        describe=lambda request: TraceHeader.model_construct(request_id=request.spec.request_id),
    )


GREEDY = Sampling(0.0)


def spec(
    prompt: list[int],
    new_tokens: int = 12,
    *,
    method: str = "vanilla",
    max_threads: int = 32,
    sampling: Sampling = GREEDY,
) -> GenerationRequest:
    return GenerationRequest(
        request_id="r",
        prompt=prompt,
        sampling=sampling,
        max_new_tokens=new_tokens,
        method=method,
        stop_token_ids=frozenset([EOS]),
        max_threads=max_threads,
    )


def add(core: EngineCore, request: GenerationRequest, sink: Callable[[Event], None] = lambda event: None) -> Request:
    opened = core.open(request, sink)
    core.scheduler.add(opened)
    return opened


def run(core: EngineCore) -> None:
    for _ in range(2000):
        if not core.step():
            break
    assert not core.scheduler.requests
    assert core.runner.pool.free == core.runner.pool.total


def prompt_of(length: int, seed: int) -> list[int]:
    chooser = random.Random(seed)
    return [chooser.randrange(7, 260) for _ in range(length)]


def answer_of(request: Request) -> list[int]:
    return request.threads[0].token_ids[len(request.spec.prompt) :]


def check(requests: Sequence[Request]) -> None:
    model = tiny_checkpoint().model
    for request in requests:
        expected = greedy(model, request.spec.prompt, request.spec.max_new_tokens, [EOS])
        assert_same_answer(model, request.spec.prompt, answer_of(request), expected)


def test_requests_join_and_leave_at_any_step() -> None:
    core, requests = make_core(), []
    for index in range(12):
        requests.append(add(core, spec(prompt_of(5 + 13 * index, index), 4 + index)))
        core.step()
    run(core)
    check(requests)


def test_a_long_prompt_does_not_stop_the_others() -> None:
    core = make_core()
    decoding = add(core, spec(prompt_of(8, 1), 30))
    core.step()
    long = add(core, spec(prompt_of(450, 2), 2))
    chunks = 0
    while not answer_of(long):
        before = len(answer_of(decoding))
        core.step()
        assert len(answer_of(decoding)) == before + 1
        chunks += 1
    assert chunks > 2
    run(core)
    check([decoding, long])


def test_nobody_overtakes_a_request_that_waits_for_pages() -> None:
    core = make_core(kv_tokens=20 * PAGE_ROWS)
    first = add(core, spec(prompt_of(12 * PAGE_ROWS, 1), 20))
    core.step()
    big = add(core, spec(prompt_of(10 * PAGE_ROWS, 2), 4))
    small = add(core, spec(prompt_of(4, 3), 4))
    while core.scheduler.requests:
        core.step()
        if not small.threads[0].waiting:
            assert not big.threads[0].waiting or big.threads[0].finished
    check([first, big, small])


def test_no_more_requests_run_than_allowed() -> None:
    core = make_core(max_requests=2)
    requests = [add(core, spec(prompt_of(6, index), 5)) for index in range(5)]
    while core.step():
        assert core.scheduler.running <= 2
    check(requests)


@pytest.mark.parametrize("seed", range(3))
def test_preempted_requests_continue_where_they_were(seed: int) -> None:
    core = make_core(kv_tokens=24 * PAGE_ROWS)
    requests = [add(core, spec(prompt_of(40 + 7 * index, seed * 10 + index), 60)) for index in range(6)]
    run(core)
    assert core.scheduler.preemptions > 0
    check(requests)


def test_the_earliest_request_is_never_preempted() -> None:
    core = make_core(kv_tokens=24 * PAGE_ROWS)
    requests = [add(core, spec(prompt_of(60, index), 70)) for index in range(5)]
    core.step()
    while not requests[0].finished:
        assert not requests[0].threads[0].waiting
        core.step()
    run(core)
    check(requests)


@pytest.mark.parametrize("kv_tokens", [2048, 40 * PAGE_ROWS])
def test_any_drafts_leave_the_answer_unchanged(kv_tokens: int) -> None:
    """Random trees on several requests beside undrafted ones, also while pages are short."""
    guesser = Guesser()
    core = make_core(kv_tokens, methods={"guess": guesser, "vanilla": Vanilla()})
    specs = [spec(prompt_of(30 + index, index), 60, method="guess" if index % 3 else "vanilla") for index in range(9)]
    for request in specs:
        guesser.known[tuple(request.prompt)] = greedy(tiny_checkpoint().model, request.prompt, 60, [EOS])
    requests = [add(core, request) for request in specs]
    run(core)
    check(requests)
    assert guesser.accepted > 50
    assert core.scheduler.preemptions > 0 or kv_tokens == 2048


def test_any_drafts_leave_sampled_text_unchanged() -> None:
    """Draws are keyed by position, so drafted and undrafted decoding with a seed give the same tokens."""
    guesser = Guesser()
    core = make_core(methods={"guess": guesser, "vanilla": Vanilla()})
    warps = [Sampling(0.9, seed=1), Sampling(1.2, top_p=0.8, seed=2), Sampling(0.8, frequency_penalty=0.5, seed=3)]
    prompts = [prompt_of(25 + index, index) for index in range(len(warps))]
    vanilla = [add(core, spec(p, 60, sampling=warp)) for p, warp in zip(prompts, warps, strict=True)]
    run(core)
    guesser.known = {tuple(request.spec.prompt): answer_of(request) for request in vanilla}
    pairs = zip(prompts, warps, strict=True)
    drafted = [add(core, spec(p, 60, method="guess", sampling=warp)) for p, warp in pairs]
    run(core)
    assert [answer_of(request) for request in drafted] == [answer_of(request) for request in vanilla]
    assert guesser.accepted > 20


def test_figures_of_drafts_follow_their_definitions() -> None:
    guesser = Guesser()
    core = make_core(methods={"guess": guesser})
    request_spec = spec(prompt_of(20, 5), 40, method="guess")
    guesser.known[tuple(request_spec.prompt)] = greedy(tiny_checkpoint().model, request_spec.prompt, 40, [EOS])
    events: list[Event] = []
    add(core, request_spec, events.append)
    run(core)
    summary = events[-1].summary
    assert summary is not None
    steps = [event.step.threads[0] for event in events if event.step]
    assert summary.tokens == events[-1].completion_tokens == sum(len(step.token_ids) for step in steps) == 40
    assert summary.mean_acceptance_length == 1 + sum(step.accepted for step in steps) / len(steps)
    assert sum(count * n for count, n in enumerate(summary.acceptance_histogram)) == guesser.accepted + (
        steps[-1].accepted  # the last step's outcome is not observed: the thread has ended
    )
    assert all(step.accepted <= step.drafted for step in steps)
    assert summary.tokens_per_step > 1.5


# ---- threads of one request ------------------------------------------------------------------------------------------

FORCED = [5, 6]


def fork_every(core: EngineCore, request: Request, rounds: int, seed: int) -> None:
    """Step the core and open children of random threads at random steps."""
    chooser = random.Random(seed)
    for _ in range(rounds):
        core.step()
        parents = [thread for thread in request.threads if not thread.finished and not thread.waiting]
        if parents and chooser.random() < 0.5:
            core.scheduler.open_thread(chooser.choice(parents), FORCED)


@pytest.mark.parametrize(("kv_tokens", "max_threads"), [(2048, 32), (2048, 2), (24 * PAGE_ROWS, 32)])
def test_every_thread_decodes_its_own_path(kv_tokens: int, max_threads: int) -> None:
    """Whatever the limits, a thread's tokens are plain decoding of its path; limits only make children wait."""
    core = make_core(kv_tokens)
    request = add(core, spec(prompt_of(21, 3), 48, max_threads=max_threads))
    other = add(core, spec(prompt_of(9, 4), 40))
    fork_every(core, request, 20, seed=1)
    run(core)
    assert len(request.threads) > 4
    model = tiny_checkpoint().model
    for thread in request.threads:
        prefix = thread.token_ids[: thread.own_start]
        budget = 21 + 48 - thread.own_start
        assert_same_answer(model, prefix, thread.token_ids[thread.own_start :], greedy(model, prefix, budget, [EOS]))
        if thread.parent:
            assert prefix[-2:] == FORCED
            assert prefix[:-2] == thread.parent.token_ids[: len(prefix) - 2]
    assert len({thread.path for thread in request.threads}) == len(request.threads)
    check([other])


def test_a_thread_limit_makes_children_wait() -> None:
    core = make_core()
    request = add(core, spec(prompt_of(21, 3), 30, max_threads=2))
    core.step()
    for _ in range(3):
        core.scheduler.open_thread(request.threads[0], FORCED)
    seen = set()
    while core.step():
        seen.add(sum(not thread.waiting and not thread.finished for thread in request.threads))
    assert max(seen) == 2
    assert request.finished


def test_a_finished_threads_own_pages_are_free_in_the_same_step() -> None:
    core = make_core()
    request = add(core, spec(prompt_of(32, 3), 40))
    core.step()
    child = core.scheduler.open_thread(request.threads[0], FORCED)
    child.token_ids += prompt_of(37, 8)  # almost at its limit
    while not child.finished:
        free = core.runner.pool.free
        held = len(child.table.pages)
        core.step()
    assert not child.table.pages
    assert core.runner.pool.free >= free + held - 3  # all but the two shared pages and a page of the parent's growth
    run(core)


def test_cancelling_releases_running_and_waiting_threads() -> None:
    core = make_core()
    request = add(core, spec(prompt_of(40, 3), 100, max_threads=2))
    core.step()
    for _ in range(4):
        core.scheduler.open_thread(request.threads[0], FORCED)
    core.step()
    request.cancelled = True
    core.step()
    assert core.runner.pool.free == core.runner.pool.total
    assert not core.scheduler.requests
    assert core.counters.cancelled == 1
