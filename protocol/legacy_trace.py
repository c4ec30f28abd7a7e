"""APAR's trace: six arrays with one full snapshot per step, made from native traces.

As in APAR's vanilla worker the forward pass that produced the last EOS of all leaves no snapshot, and a thread that
emitted its EOS in a step still counts in it. Unlike there, the last token of an answer that ends by length is kept, and
a child's first token comes with its [Child]. Needs traces taken with ``trace: "full"``, which carry the prompt's ids.
"""

import copy
from collections.abc import Iterator
from itertools import count
from typing import Any

from protocol.reading_order import ReadingOrder
from protocol.trace import RequestTrace, StepTrace, ThreadStep
from protocol.wire import Wire


class LegacyTrace(Wire):
    """Arrays indexed by step; then ``responses`` and ``global_root`` by prompt, ``ret_input_ids`` by thread."""

    responses: list[list[str]]
    ret_input_ids: list[list[list[int]]]
    global_root: list[list[dict[str, Any]]]
    g_to_i: list[dict[str, int]]
    elapse: list[float]
    dynamic_bs: list[int]


def legacy_trace(*traces: RequestTrace) -> LegacyTrace:
    """Convert the traces of one batch of prompts.

    Raises:
        ValueError: a trace lacks its prompt's token ids.
    """
    gids = count()
    told = [_Told(trace, gids) for trace in traces]
    legacy = LegacyTrace(responses=[], ret_input_ids=[], global_root=[], g_to_i=[], elapse=[], dynamic_bs=[])
    for step in range(_recorded(told)):
        for one in told:
            one.take(step)
        paths = {gid: path for one in told for gid, path in one.paths.items()}
        live = sorted(gid for one in told for gid in one.live)
        legacy.responses.append([one.order.snapshot() for one in told])
        legacy.ret_input_ids.append([list(paths[gid]) for gid in sorted(paths)])
        legacy.global_root.append([copy.deepcopy(one.root) for one in told])
        legacy.g_to_i.append({str(gid): row for row, gid in enumerate(live)})
        legacy.elapse.append(max(one.elapsed_s for one in told))
        legacy.dynamic_bs.append(len(live))
    return legacy


class _Told:
    """What a trace has told up to some step. Threads have global numbers (gid) of a whole batch.

    Attributes:
        paths: by gid, all token ids of a path, the prompt's first.
        root: APAR's tree of spans; ``start`` and ``termination`` are places in the path of ``gid``.
        live: gids of the threads that had not ended before the step.
    """

    def __init__(self, trace: RequestTrace, gids: Iterator[int]) -> None:
        if trace.header.prompt_token_ids is None:
            raise ValueError('the trace has no prompt token ids: take it with trace: "full"')
        self.steps = trace.steps
        self.order = ReadingOrder(trace.header.whitespace)
        self.elapsed_s = 0.0
        self._control = trace.header.control_tokens
        self._gids = gids
        gid = next(gids)
        self._gid_of = [gid]  # by thread
        self.paths = {gid: list(trace.header.prompt_token_ids)}
        self.root = _span(trace.header.prompt_tokens, gid)
        self.live: list[int] = [gid]
        self._growing = {gid: self.root}
        self._ended: set[int] = set()
        self._born: set[int] = set()  # have not said their [Child]

    def take(self, step: int) -> None:
        """The next step happens, if there is one."""
        self.live = [gid for gid in self._gid_of if gid not in self._ended] if step < len(self.steps) else []
        for thread in self.steps[step].threads if step < len(self.steps) else []:
            self._take(thread)
        if step < len(self.steps):
            self.elapsed_s = self.steps[step].t_ms / 1000

    def _take(self, thread: ThreadStep) -> None:
        gid = self._gid_of[thread.thread]
        path = self.paths[gid]
        if self._control and gid in self._born:
            path.append(self._control[1])
            self._born.remove(gid)
        path += thread.token_ids
        self.order.push(thread.thread, thread.text)
        if thread.finish_reason:
            self.order.finish(thread.thread)
            self._ended.add(gid)
        elif self._control and path[-1] == self._control[0]:
            self._fork(thread.thread, gid)

    def _fork(self, thread: int, gid: int) -> None:
        child, place = next(self._gids), len(self.paths[gid]) - 1
        self.order.fork(thread, len(self._gid_of))
        self._gid_of.append(child)
        self.paths[child] = list(self.paths[gid])
        before = self._growing[gid]
        before["termination"] = place
        self._growing[gid] = before["next"] = _span(place + 1, gid)
        self._growing[child] = before["detail"] = _span(place + 2, child)
        self.live.append(child)
        self._born.add(child)


def _span(start: int, gid: int) -> dict[str, Any]:
    return {"start": start, "gid": gid, "termination": None, "next": None, "detail": None}


def _recorded(told: list[_Told]) -> int:
    """The number of steps that leave a snapshot."""
    steps = max((len(one.steps) for one in told), default=0)
    says_nothing = all(_is_end(one.steps[-1]) for one in told if len(one.steps) == steps and steps)
    return steps - 1 if says_nothing and steps > 1 else steps


def _is_end(step: StepTrace) -> bool:
    """Whether all that its threads said is EOS; with drafts more may stand before it."""
    return all(thread.finish_reason == "stop" and len(thread.token_ids) == 1 for thread in step.threads)
