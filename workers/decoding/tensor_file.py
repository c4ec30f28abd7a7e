"""Files of trained tensors: safetensors, or pickles that hold nothing but tensors."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from workers.decoding.interface import BadAdapter


def open_tensors(file: Path) -> Mapping[str, Callable[[], torch.Tensor]]:
    """Key → how to load it. Pickles are read as plain tensors only. Raises BadAdapter."""
    try:
        if file.suffix == ".safetensors":
            opened = safe_open(file, framework="pt")
            return {name: partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        loaded = torch.load(file, map_location="cpu", weights_only=True)
        return {name: partial(loaded.__getitem__, name) for name in loaded if torch.is_tensor(loaded[name])}
    except (OSError, SafetensorError) as error:
        raise BadAdapter(f"{file.name} cannot be read: {error}") from None
    except Exception:  # whatever a pickle of something else raises
        raise BadAdapter(f"{file.name} does not hold plain tensors: save it again as safetensors") from None
