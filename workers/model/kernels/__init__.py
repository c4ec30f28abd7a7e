"""CPU kernels for narrow steps: products and attention for a few rows, where stock ones cost far more than one row.

Written in C++ and compiled on this machine, for this machine, the first time they are needed; see product.h and
attention.h. Without a C++ compiler everything runs on torch's own operations.
"""

import torch

NARROW_ROWS = 64  # wider steps are bound by arithmetic, which stock operations do as well

_library = torch.library.Library("polydecode", "DEF")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.define("linear_int8(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor")
_library.define(
    "attend(Tensor query, Tensor key, Tensor value, int layer, float scale, int window, float softcap, Tensor? sinks)"
    " -> Tensor"
)
_library.define(
    "begin_step(Tensor layers, int step_base, Tensor slots, Tensor positions, Tensor stops, Tensor first_partial,"
    " Tensor tree_offsets, Tensor tree_keys, Tensor item_chunks, Tensor item_pages, Tensor item_offsets,"
    " Tensor item_rows) -> ()"
)
_library.define("end_step(Tensor layers) -> ()")


@torch.library.register_fake("polydecode::linear")
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("polydecode::linear_int8")
def _(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("polydecode::attend")
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
