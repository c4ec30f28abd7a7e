"""Number types of training: parameters in float32, products in bfloat16 where the device is faster at them."""

import torch


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are several times as fast as float32 ones: on GPUs and CPUs with matrix tiles."""
    return device.type == "cuda" or bool(torch.cpu._is_amx_tile_supported())


def product_dtype(device: torch.device) -> torch.dtype:
    """In what a device multiplies best."""
    return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32


def fast_products(device: torch.device) -> torch.autocast:
    """A context in which linear layers multiply in bfloat16 where that pays."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bfloat16(device))
