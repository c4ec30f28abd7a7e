"""Which GPUs a worker can be put on, found without importing torch."""

import os
import subprocess


def visible_gpus() -> list[str]:
    """The values for CUDA_VISIBLE_DEVICES that choose one GPU each; none on a machine without."""
    count = _installed()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or count == 0:
        return [str(index) for index in range(count)]
    return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]


def _installed() -> int:
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
