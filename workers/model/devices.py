"""Devices and number types: names, defaults, and the time that a device takes."""

import os
import platform
from functools import lru_cache
from pathlib import Path
from time import perf_counter

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_device(name: str | None) -> torch.device:
    """The device of that name; by default the first GPU, else the CPU.

    Raises:
        ValueError: there is none, or it is of a kind that is not supported; one line.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"no such device: {name}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name}: only cpu and cuda are supported")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name}: torch finds {torch.cuda.device_count()} GPUs that it can use")
    return device


def find_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The number type of that name; by default float32 on a CPU and bfloat16 on a GPU. Raises ValueError."""
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}")
    return DTYPES[name]


@lru_cache(maxsize=8)
def device_name(device: torch.device) -> str:
    """The maker's name for it; of a CPU also how many cores there are."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()} ({os.cpu_count()} cores)"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


class Stopwatch:
    """Times a device's work without waiting for it: on a GPU by events in its stream."""

    def __init__(self, device: torch.device) -> None:
        """Starts at once."""
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self._times = [perf_counter()]
        if self._events:
            self._events[0].record()

    def stop(self) -> None:
        """What was given to the device until now counts."""
        if self._events:
            self._events[1].record()
        self._times.append(perf_counter())

    def ms(self) -> float:
        """Milliseconds; waits for a GPU that is not done."""
        if self._events:
            self._events[1].synchronize()
            return self._events[0].elapsed_time(self._events[1])
        return 1000 * (self._times[1] - self._times[0])
