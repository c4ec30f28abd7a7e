"""Two processes share every batch and end with the heads of one."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import debug_launcher

from tests.support.tiny import tiny_checkpoint
from training.hidden import HiddenStates
from training.loop import Schedule
from training.medusa import train_heads
from workers.decoding.heads import MedusaHeads
from workers.model.quantization import output_projection


def train_tiny(folder: Path, name: str) -> None:
    projection = output_projection(tiny_checkpoint().model)
    vocabulary, hidden = projection.shape
    draws = np.random.default_rng(0)
    chosen = draws.integers(0, vocabulary, 256, dtype=np.int32)
    following = np.stack([(chosen + 1) % vocabulary, (chosen + 2) % vocabulary], axis=1)
    states = HiddenStates(
        draws.normal(size=(256, hidden)).astype(np.float16), chosen, following, np.repeat(np.arange(8), 32)
    )
    heads, losses = train_heads(
        states,
        MedusaHeads.blank(2, 1, projection, embeddings=projection),
        schedule=Schedule(12, 1e-3),
        batch=64,
        seed=0,
        checkpoint=folder / f"{name}.state",
        resume=False,
    )
    torch.save([*heads.parameters()], folder / f"{name}-{len(losses)}.pt")


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    # From a fresh interpreter: threads of this one would not survive the fork.
    command = [sys.executable, "-m", "tests.training.test_several_devices", str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    train_tiny(tmp_path, "alone")
    alone, together = (torch.load(tmp_path / f"{name}-12.pt") for name in ("alone", "together"))
    for one, other in zip(alone, together, strict=True):
        assert one.abs().max() > 0
        assert torch.allclose(one, other, atol=2e-3)  # Adam enlarges differences of rounding where a gradient is small


if __name__ == "__main__":
    debug_launcher(train_tiny, (Path(sys.argv[1]), "together"), num_processes=2)
