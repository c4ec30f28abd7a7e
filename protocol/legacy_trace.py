"""APAR's trace: six arrays with one full snapshot per step, made from native traces.

As in APAR's vanilla worker the forward pass that produced the final EOS leaves no snapshot. Unlike there, the last
token of an answer that ends by length is kept. Needs traces taken with ``trace: "full"``, which carry the prompt's ids.
"""

from typing import Any

from protocol.trace import RequestTrace, StepTrace
from protocol.wire import Wire


class LegacyTrace(Wire):
    """Arrays indexed by step; then ``responses`` and ``global_root`` by prompt, ``ret_input_ids`` by thread."""

    responses: list[list[str]]
    ret_input_ids: list[list[list[int]]]
    global_root: list[list[dict[str, Any]]]
    g_to_i: list[dict[str, int]]
    elapse: list[float]
    dynamic_bs: list[int]


class _Snapshot:
    """One prompt's answer after some step."""

    def __init__(self, text: str, ids: list[int], elapsed_s: float) -> None:
        self.text = text
        self.ids = ids
        self.elapsed_s = elapsed_s


def legacy_trace(*traces: RequestTrace) -> LegacyTrace:
    """Convert the traces of one batch of prompts, one single-thread trace each.

    Raises:
        ValueError: a trace lacks its prompt's token ids.
    """
    histories = [_snapshots(trace) for trace in traces]
    roots = [{"start": trace.header.prompt_tokens, "gid": gid, **_UNFORKED} for gid, trace in enumerate(traces)]
    legacy = LegacyTrace(responses=[], ret_input_ids=[], global_root=[], g_to_i=[], elapse=[], dynamic_bs=[])
    for step in range(max(map(len, histories), default=0)):
        now = [history[min(step, len(history) - 1)] for history in histories]
        live = [gid for gid, history in enumerate(histories) if step < len(history)]
        legacy.responses.append([snapshot.text for snapshot in now])
        legacy.ret_input_ids.append([snapshot.ids for snapshot in now])
        legacy.global_root.append([dict(root) for root in roots])
        legacy.g_to_i.append({str(gid): row for row, gid in enumerate(live)})
        legacy.elapse.append(max(snapshot.elapsed_s for snapshot in now))
        legacy.dynamic_bs.append(len(live))
    return legacy


_UNFORKED = {"termination": None, "next": None, "detail": None}


def _snapshots(trace: RequestTrace) -> list[_Snapshot]:
    if trace.header.prompt_token_ids is None:
        raise ValueError('the trace has no prompt token ids: take it with trace: "full"')
    text, ids, history = "", list(trace.header.prompt_token_ids), []
    for step in _recorded(trace.steps):
        for thread in step.threads:
            text += thread.text
            ids = ids + thread.token_ids
        history.append(_Snapshot(text, ids, step.t_ms / 1000))
    return history


def _recorded(steps: list[StepTrace]) -> list[StepTrace]:
    ends_by_eos = any(thread.finish_reason == "stop" for thread in steps[-1].threads) if steps else False
    return steps[:-1] if ends_by_eos and len(steps) > 1 else steps
