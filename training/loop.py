"""The loop that all trainers share: a batch is a function of its step, so that a killed training goes on as it was."""

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

logger = logging.getLogger(__name__)

REPORT_S = 10.0
SAVE_S = 60.0


@dataclass(frozen=True)
class Schedule:
    """Adam's steps: ``warmup`` of them up to ``learning_rate``, the others down to 0 on a cosine."""

    steps: int
    learning_rate: float
    warmup: float = 0.1
    weight_decay: float = 0.0

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        rising = max(1, int(self.steps * self.warmup))
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def train(
    module: nn.Module,
    loss_of: Callable[[int], torch.Tensor],
    schedule: Schedule,
    checkpoint: Path,
    *,
    accelerator: Accelerator,
    resume: bool,
    of: str = "",
    stop_at: int | None = None,
) -> list[float]:
    """Train ``module``'s parameters in place; returns the loss of every step.

    Args:
        loss_of: step → the loss of its batch, by ``module``'s current parameters; equal on every run.
        checkpoint: where the state is kept, about once a minute and at the end.
        resume: go on from there if it exists. Raises ValueError if that was another training.
        of: what makes it another one, beside the schedule.
        stop_at: end before this step, as if killed right after it was saved.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    losses: list[float] = []
    made = {**asdict(schedule), "of": of}
    if resume and checkpoint.is_file():
        losses = _restore(module, optimizer, made, checkpoint)
        logger.info("going on at step %d of %d", len(losses), schedule.steps)
    started, first = perf_counter(), len(losses)
    reported = saved = started
    last = schedule.steps if stop_at is None else min(stop_at, schedule.steps)
    while len(losses) < last:
        losses.append(_step(module, trained, optimizer, loss_of, schedule, len(losses), accelerator))
        now = perf_counter()
        if now - reported > REPORT_S or len(losses) == last:
            reported = now
            ahead = (schedule.steps - len(losses)) * (now - started) / (len(losses) - first)
            mean = sum(losses[-20:]) / len(losses[-20:])
            logger.info("step %d of %d, loss %.3f, %.1f minutes to go", len(losses), schedule.steps, mean, ahead / 60)
        if (now - saved > SAVE_S or len(losses) == last) and accelerator.is_main_process:
            saved = now
            _save(module, optimizer, made, losses, checkpoint)
    return losses


def _step(
    module: nn.Module,
    trained: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[int], torch.Tensor],
    schedule: Schedule,
    step: int,
    accelerator: Accelerator,
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = schedule.rate(step)
    loss = loss_of(step)
    optimizer.zero_grad()
    loss.backward()
    if accelerator.num_processes > 1:  # every process had its own part of the batch
        for parameter in trained:
            parameter.grad = accelerator.reduce(parameter.grad, reduction="mean")
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    return float(loss.detach())


def _save(
    module: nn.Module, optimizer: torch.optim.Optimizer, made: dict[str, Any], losses: list[float], checkpoint: Path
) -> None:
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    scratch = checkpoint.with_suffix(".tmp")
    state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
    torch.save({**state, "made": made}, scratch)
    scratch.replace(checkpoint)


def _restore(
    module: nn.Module, optimizer: torch.optim.Optimizer, made: dict[str, Any], checkpoint: Path
) -> list[float]:
    state: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if state.get("made") != made:
        raise ValueError(f"{checkpoint} is of another training ({state.get('made')}): remove it, or train as before")
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    losses: list[float] = state["losses"]
    return losses
