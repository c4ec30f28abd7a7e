"""APAR's trace: six arrays with one full snapshot per step, made from a native trace.

As in APAR's vanilla worker the forward pass that produced the final EOS leaves no snapshot. Unlike it, the last token of
an answer that ends by length is kept. Needs a trace taken with ``trace: "full"``, which carries the prompt's token ids.
"""

from typing import Any

from protocol.trace import RequestTrace, StepTrace
from protocol.wire import Wire


class LegacyTrace(Wire):
    """Arrays are indexed by step, then (where nested) by prompt; there is always one prompt."""

    responses: list[list[str]]
    ret_input_ids: list[list[list[list[int]]]]
    global_root: list[list[dict[str, Any]]]
    g_to_i: list[dict[str, int]]
    elapse: list[float]
    dynamic_bs: list[int]


def legacy_trace(trace: RequestTrace) -> LegacyTrace:
    """Convert one native trace of a single-thread request.

    Raises:
        ValueError: the trace lacks its prompt's token ids.
    """
    prompt = trace.header.prompt_token_ids
    if prompt is None:
        raise ValueError('the trace has no prompt token ids: take it with trace: "full"')
    legacy = LegacyTrace(responses=[], ret_input_ids=[], global_root=[], g_to_i=[], elapse=[], dynamic_bs=[])
    text, ids = "", list(prompt)
    root = {"start": len(prompt), "gid": 0, "termination": None, "next": None, "detail": None}
    for step in _recorded(trace.steps):
        for thread in step.threads:
            text += thread.text
            ids = ids + thread.token_ids
        legacy.responses.append([text])
        legacy.ret_input_ids.append([[ids]])
        legacy.global_root.append([dict(root)])
        legacy.g_to_i.append({"0": 0})
        legacy.elapse.append(step.t_ms / 1000)
        legacy.dynamic_bs.append(1)
    return legacy


def _recorded(steps: list[StepTrace]) -> list[StepTrace]:
    if len(steps) > 1 and any(thread.finish_reason == "stop" for thread in steps[-1].threads):
        return steps[:-1]
    return steps
