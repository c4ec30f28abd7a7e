"""Paged tree attention for narrow steps on a GPU, in Triton: the twin of attention.h.

One program computes one row's query heads of one key head: it runs over the row's pages, then over the step rows that
the row sees, with an online softmax. It reads everything that changes between steps from tensors of fixed shape, so
that one captured graph serves every step.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from workers.model.pages import PAGE_ROWS

KEYS = 64  # read at a time


@dataclass(frozen=True)
class StepTables:
    """What the kernel reads of a step of R rows, all int32 on the device.

    Attributes:
        positions, stops, owners: [R]; a row sees ``stops`` rows of its thread's pages, its line is ``owners``.
        visible: [R, R], nonzero where a row sees a row of the step buffers.
        pages: [R, P], a line a thread.
    """

    positions: torch.Tensor
    stops: torch.Tensor
    owners: torch.Tensor
    visible: torch.Tensor
    pages: torch.Tensor


@triton.jit
def _fold(
    query, keys, values, slots, seen, width, value_width, scale, softcap, weighted, total, most,
    CAPPED: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Fold some keys into a running softmax: weighted float[G, V], total and most float[G]."""
    d = tl.arange(0, D)
    v = tl.arange(0, V)
    key = tl.load(keys + slots[:, None] * width + d[None, :], mask=seen[:, None] & (d < width)[None, :], other=0.0)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    if CAPPED:
        scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
    scores = tl.where(seen[None, :], scores, float("-inf"))
    now = tl.maximum(most, tl.max(scores, 1))
    base = tl.where(now == float("-inf"), 0.0, now)
    weights = tl.exp(scores - base[:, None])
    kept = tl.exp(most - base)
    value = tl.load(
        values + slots[:, None] * value_width + v[None, :], mask=seen[:, None] & (v < value_width)[None, :], other=0.0
    )
    weighted = weighted * kept[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return weighted, total * kept + tl.sum(weights, 1), now


@triton.jit
def _attend(
    query, keys, values, out, sinks, positions, stops, owners, visible, pages,
    rows, heads, width, value_width, head_stride, row_stride, key_stride, value_stride, page_lines, step_base,
    scale, softcap, window,
    CAPPED: tl.constexpr, SINKS: tl.constexpr, GROUPS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    BLOCK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    key_head = tl.program_id(1).to(tl.int64)
    g = tl.arange(0, G)
    d = tl.arange(0, D)
    v = tl.arange(0, V)
    head = key_head * GROUPS + g
    own = tl.load(
        query + head[:, None] * head_stride + row * row_stride + d[None, :],
        mask=(g < GROUPS)[:, None] & (d < width)[None, :],
        other=0.0,
    )
    keys += key_head * key_stride
    values += key_head * value_stride
    position = tl.load(positions + row)
    stop = tl.load(stops + row)
    line = pages + tl.load(owners + row).to(tl.int64) * page_lines
    most = tl.full([G], float("-inf"), tl.float32)
    total = tl.zeros([G], tl.float32)
    if SINKS:
        most = tl.load(sinks + head, mask=g < GROUPS, other=0.0).to(tl.float32)
        total += 1.0
    weighted = tl.zeros([G, V], tl.float32)
    first = tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)
    for start in range(first // BLOCK * BLOCK, stop, BLOCK):
        at = start + tl.arange(0, BLOCK)
        seen = (at >= first) & (at < stop)
        slots = tl.load(line + at // PAGE, mask=seen, other=0).to(tl.int64) * PAGE + at % PAGE
        weighted, total, most = _fold(
            own, keys, values, slots, seen, width, value_width, scale, softcap, weighted, total, most, CAPPED, D, V
        )
    for start in range(0, rows, BLOCK):
        at = start + tl.arange(0, BLOCK)
        place = tl.load(positions + at, mask=at < rows, other=0)
        shown = tl.load(visible + row * rows + at, mask=at < rows, other=0)
        seen = (tl.where(window > 0, position - place < window, at < rows) & (shown != 0)) != 0
        weighted, total, most = _fold(
            own, keys, values, step_base + at.to(tl.int64), seen, width, value_width, scale, softcap, weighted, total,
            most, CAPPED, D, V,
        )  # fmt: skip
    result = weighted / total[:, None]
    tl.store(
        out + (row * heads + head[:, None]) * value_width + v[None, :],
        result.to(out.dtype.element_ty),
        mask=(g < GROUPS)[:, None] & (v < value_width)[None, :],
    )


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: StepTables,
    step_base: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """query float[1, H, R, d], stored keys float[K, slots, d] and values float[K, slots, v] → float[1, R, H, v]."""
    _, heads, rows, width = query.shape
    key_heads, _, value_width = values.shape
    groups = heads // key_heads
    out = query.new_empty(1, rows, heads, value_width)
    query = query if query.stride(3) == 1 else query.contiguous()
    _attend[rows, key_heads](
        query, keys, values, out, out if sinks is None else sinks,
        tables.positions, tables.stops, tables.owners, tables.visible, tables.pages,
        rows, heads, width, value_width, query.stride(1), query.stride(2), keys.stride(0), values.stride(0),
        tables.pages.shape[1], step_base, scale, softcap, window,
        CAPPED=softcap > 0, SINKS=sinks is not None, GROUPS=groups, G=max(16, triton.next_power_of_2(groups)),
        D=max(16, triton.next_power_of_2(width)), V=max(16, triton.next_power_of_2(value_width)),
        BLOCK=KEYS, PAGE=PAGE_ROWS,
    )  # fmt: skip
    return out
