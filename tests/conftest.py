"""For all tests."""

import os

# The tests compute on their own thread beside the engine's. A second pool of OpenMP threads would slow both down, and
# tiny models gain nothing from a second core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, which torch does at its own time
