"""Continuous batching: which threads take part in a step, and how many of their tokens.

Threads wait or run. A waiting thread is a new request's root, a child above its request's thread limit, or one that was
preempted because pages ran out; all of them are admitted in one order (earlier requests first, then earlier threads) as
soon as pages for their tokens are free. A preempted thread lost its pages and reads its tokens again.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from workers.model.pages import OutOfPages
from workers.model.runner import ModelRunner
from workers.request import Request, Thread

DECODE_ROWS = 4  # a run up to this long counts as decoding: it is never chunked
PREFILL_ROWS_BESIDE_DECODING = 128  # bounds how long a prompt may delay the next token of others, in wide steps
MIN_CHUNK = 16


@dataclass(frozen=True)
class Turn:
    """A thread's part in a step: its next ``rows`` pending tokens."""

    thread: Thread
    rows: int

    @property
    def completes(self) -> bool:
        """Whether the run reaches the thread's last token, so that a new token can be chosen."""
        return self.rows == self.thread.pending

    @property
    def token_ids(self) -> list[int]:
        start = self.thread.table.length
        return self.thread.token_ids[start : start + self.rows]


class Scheduler:
    """Requests and threads of one model. The engine's thread alone calls it."""

    def __init__(self, runner: ModelRunner, *, max_requests: int) -> None:
        """``max_requests`` may run at a time."""
        self._runner = runner
        self._max_requests = max_requests
        self._arrivals = 0
        self.requests: list[Request] = []
        self.preemptions = 0

    @property
    def running(self) -> int:
        """Requests with a running thread."""
        return sum(request.running for request in self.requests)

    @property
    def queued(self) -> int:
        """Requests without one."""
        return len(self.requests) - self.running

    def add(self, request: Request) -> None:
        """Queue a request."""
        request.arrival = self._arrivals
        self._arrivals += 1
        request.threads.append(Thread(request, list(request.spec.prompt), self._runner.new_table()))
        self.requests.append(request)

    def open_thread(self, parent: Thread, forced: Iterable[int]) -> Thread:
        """A child that shares ``parent``'s path so far and continues with ``forced``; it waits to be admitted."""
        try:
            table = self._runner.fork(parent.table)
        except OutOfPages:  # it reads its path again when pages are free
            table = self._runner.new_table()
        child = Thread(parent.request, [*parent.token_ids, *forced], table, parent=parent)
        parent.children += 1
        parent.request.threads.append(child)
        parent.request.reading.fork(parent.number, child.number)
        if child.remaining <= 0:
            child.finish_reason = "length"
            parent.request.reading.finish(child.number)
        return child

    def close_thread(self, thread: Thread) -> None:
        """Give a finished thread's own pages back at once."""
        thread.table.release()
        thread.state.clear()

    def remove(self, request: Request) -> None:
        """Release everything that a request holds; harmless if it is gone already."""
        for thread in request.threads:
            self.close_thread(thread)
        if request in self.requests:
            self.requests.remove(request)

    def plan(self) -> list[Turn]:
        """Admit, share out the step's rows, and make room in the pages for every turn."""
        self._admit()
        turns = self._share_rows([thread for thread in self._live() if not thread.waiting])
        turns = [turn for turn in turns if self._make_room(turn)]
        return [turn for turn in turns if not turn.thread.waiting]  # a later turn may have preempted an earlier one

    def reserve_draft(self, thread: Thread, rows: int) -> bool:
        """Make room for ``rows`` accepted rows behind a completed run, if pages are free; preempts nobody."""
        try:
            thread.table.reserve(thread.pending + rows)
        except OutOfPages:
            return False
        return True

    def preempt(self, thread: Thread) -> None:
        """Take a thread's pages away; it waits to be admitted again."""
        thread.table.release()
        thread.state.clear()
        thread.waiting = True
        self.preemptions += 1

    def _live(self) -> list[Thread]:
        """Unfinished threads in order of precedence."""
        return [thread for request in self.requests for thread in request.threads if not thread.finished]

    def _admit(self) -> None:
        live = self._live()
        running = [thread for thread in live if not thread.waiting]
        busy = Counter(id(thread.request) for thread in running)  # requests, and how many of their threads run
        for thread in live:
            request = id(thread.request)
            if not thread.waiting or busy[request] >= thread.request.spec.max_threads:
                continue
            if request not in busy and len(busy) >= self._max_requests:
                return
            # One page of margin for every running thread keeps an admission from causing a preemption at once.
            if not running:
                self._reserve(thread, thread.pending)
            elif thread.table.missing_pages(thread.pending) + len(running) <= self._runner.pool.free:
                thread.table.reserve(thread.pending)
            else:
                return  # nobody overtakes: a large request would wait for ever
            thread.waiting = False
            running.append(thread)
            busy[request] += 1

    def _share_rows(self, threads: list[Thread]) -> list[Turn]:
        """Decoding threads first, whole; what is left goes in equal chunks to those that still read their prompts."""
        room = self._runner.step_rows
        decoding = [thread for thread in threads if thread.pending <= DECODE_ROWS][: room // DECODE_ROWS]
        reading = [thread for thread in threads if thread.pending > DECODE_ROWS]
        turns = [Turn(thread, thread.pending) for thread in decoding]
        room -= sum(turn.rows for turn in turns)
        if decoding:
            room = min(room, self._rows_beside(sum(turn.rows for turn in turns)))
        for index, thread in enumerate(reading):
            fair = max(MIN_CHUNK, room // (len(reading) - index))
            rows = min(thread.pending, fair, room)
            if rows <= 0:
                break
            turns.append(Turn(thread, rows))
            room -= rows
        return turns

    def _rows_beside(self, decoding: int) -> int:
        """Rows of prompts beside ``decoding`` rows: as many as keep the step on the kernels of narrow ones."""
        spare = self._runner.narrow_rows - decoding
        return spare if spare >= MIN_CHUNK else PREFILL_ROWS_BESIDE_DECODING

    def _make_room(self, turn: Turn) -> bool:
        """Reserve pages for a turn, preempting later threads; False if the thread itself had to give way."""
        return not turn.thread.waiting and self._reserve(turn.thread, turn.rows)

    def _reserve(self, thread: Thread, rows: int) -> bool:
        while True:
            try:
                thread.table.reserve(rows)
                return True
            except OutOfPages:
                victim = self._last_holder()
                self.preempt(victim)
                if victim is thread:
                    return False

    def _last_holder(self) -> Thread:
        return max((thread for thread in self._live() if thread.table.pages), key=lambda thread: thread.order)
