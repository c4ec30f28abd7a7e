"""Key and value storage: pages of committed rows, and behind them the buffers of the running step.

One tensor a layer, float[heads, slots + step_rows, width]; slot ``page * PAGE_ROWS + i`` is row i of a page, and the
last ``step_rows`` slots are the step buffers. Rows of runs are committed tokens and go straight to their pages; rows of
trees go to the buffers, and commit copies the accepted ones into pages. Attention reads both through one index. Layers
of equal shape lie in one tensor, so that a commit is two copies and not two a layer.
"""

from dataclasses import dataclass

import torch

from workers.model.pages import PAGE_ROWS, Slots


@dataclass(frozen=True)
class LayerShape:
    """Key heads, key width and value width of one layer (a head has the same count for both)."""

    heads: int
    key_width: int
    value_width: int

    @property
    def row_elements(self) -> int:
        return self.heads * (self.key_width + self.value_width)


class KVStore:
    """Storage for ``pages`` pages and ``step_rows`` step rows of every layer in ``shapes``.

    ``addresses``: int64[layers, 6], where each layer's keys and values lie, their strides between heads and their
    widths (LayerCache of kernels/attention.h).
    """

    def __init__(
        self, shapes: dict[int, LayerShape], pages: int, step_rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.step_base = pages * PAGE_ROWS
        self.step_rows = step_rows
        self._groups: list[torch.Tensor] = []
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        slots = self.step_base + step_rows
        addresses = torch.zeros(1 + max(shapes), 6, dtype=torch.int64)
        for shape in dict.fromkeys(shapes.values()):
            members = [layer for layer, own in shapes.items() if own == shape]
            keys = torch.empty(len(members), shape.heads, slots, shape.key_width, dtype=dtype, device=device)
            values = torch.empty(len(members), shape.heads, slots, shape.value_width, dtype=dtype, device=device)
            self._groups += [keys, values]
            for index, layer in enumerate(members):
                self._layers[layer] = (keys[index], values[index])
                own = self._layers[layer]
                places = [*(cache.data_ptr() for cache in own), *(cache.stride(0) for cache in own)]
                addresses[layer] = torch.tensor([*places, shape.key_width, shape.value_width])
        self.addresses = addresses

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of a layer: float[heads, slots + step_rows, width] each."""
        return self._layers[layer]

    def write(self, layer: int, slots: Slots, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put the step's keys and values, float[heads, T, width] each, into T slots."""
        stored_keys, stored_values = self._layers[layer]
        if isinstance(slots, slice):
            stored_keys[:, slots] = keys
            stored_values[:, slots] = values
        else:
            stored_keys.index_copy_(1, slots, keys)
            stored_values.index_copy_(1, slots, values)

    def read(self, layer: int, slots: Slots) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of n slots: float[heads, n, width] each; views where the slots are a slice."""
        keys, values = self._layers[layer]
        if isinstance(slots, slice):
            return keys[:, slots], values[:, slots]
        return keys.index_select(1, slots), values.index_select(1, slots)

    def commit(self, step_rows: torch.Tensor, slots: torch.Tensor) -> None:
        """Copy rows int64[n] of the step buffers into page slots int64[n], in every layer."""
        source = step_rows + self.step_base
        for group in self._groups:
            group[:, :, slots] = group[:, :, source]

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page in every layer (a fork's partly filled last page)."""
        first, second = source * PAGE_ROWS, target * PAGE_ROWS
        for group in self._groups:
            group[:, :, second : second + PAGE_ROWS] = group[:, :, first : first + PAGE_ROWS]
