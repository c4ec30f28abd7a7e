"""Key and value storage: pages of committed rows, and behind them the buffers of the running step.

One tensor a layer, float[slots + step_rows, heads, width]; slot ``page * PAGE_ROWS + i`` is row i of a page, and the
last ``step_rows`` slots are the step buffers. Attention reads both through one index; commit copies accepted rows from
the buffers into pages. Layers of equal shape lie in one tensor, so that a commit is two copies and not two a layer.
"""

from dataclasses import dataclass

import torch

from workers.model.pages import PAGE_ROWS


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
    """Storage for ``pages`` pages and ``step_rows`` step rows of every layer in ``shapes``."""

    def __init__(
        self, shapes: dict[int, LayerShape], pages: int, step_rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.step_base = pages * PAGE_ROWS
        self.step_rows = step_rows
        self._groups: list[torch.Tensor] = []
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        slots = self.step_base + step_rows
        for shape in dict.fromkeys(shapes.values()):
            members = [layer for layer, own in shapes.items() if own == shape]
            keys = torch.empty(len(members), slots, shape.heads, shape.key_width, dtype=dtype, device=device)
            values = torch.empty(len(members), slots, shape.heads, shape.value_width, dtype=dtype, device=device)
            self._groups += [keys, values]
            for index, layer in enumerate(members):
                self._layers[layer] = (keys[index], values[index])

    def write_step(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put the step's keys and values, float[T, heads, width] each, into the step buffers."""
        stored_keys, stored_values = self._layers[layer]
        stop = self.step_base + len(keys)
        stored_keys[self.step_base : stop] = keys
        stored_values[self.step_base : stop] = values

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of ``slots`` int64[n]: float[n, heads, width] each (copies)."""
        keys, values = self._layers[layer]
        return keys.index_select(0, slots), values.index_select(0, slots)

    def commit(self, step_rows: torch.Tensor, slots: torch.Tensor) -> None:
        """Copy step rows int64[n] into page slots int64[n], in every layer."""
        source = step_rows + self.step_base
        for group in self._groups:
            group[:, slots] = group[:, source]

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page in every layer (a fork's partly filled last page)."""
        first, second = source * PAGE_ROWS, target * PAGE_ROWS
        for group in self._groups:
            group[:, second : second + PAGE_ROWS] = group[:, first : first + PAGE_ROWS]
