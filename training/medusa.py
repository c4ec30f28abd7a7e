"""``python -m training.medusa``: heads for any model, from its own answers to prompts (self-distillation, Medusa-1).

The base stays as it is. Answers, and the last hidden states behind them, are computed once and kept. Heads learn from
these, on answers alone and over the tokens that the model uses most, what the model itself says at the place that they
are to guess: all its probabilities, with weights 0.8^k. Beside the heads the folder gets their accuracies on answers
held out, the trees that follow, the loss curve, and where all of it came from.
"""

import json
import logging
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from accelerate import Accelerator
from transformers import PreTrainedModel

from training.answers import own_answers
from training.examples import examples_of, held_out, is_held_out, most_used
from training.head_accuracy import accuracies, write_measures
from training.hidden import HiddenStates, hidden_states
from training.loop import Schedule, train
from training.pictures import loss_curve
from training.precision import fast_products, product_dtype
from training.prompts import benchmarks_of, load_prompts
from training.provenance import fingerprint, provenance
from training.vocabulary_loss import vocabulary_loss
from workers.decoding.heads import MedusaHeads
from workers.decoding.interface import BadAdapter
from workers.decoding.medusa_checkpoint import load_heads, save_heads
from workers.decoding.registry import BASELINE
from workers.model.checkpoint import load_checkpoint
from workers.model.devices import find_device, find_dtype
from workers.model.quantization import input_embeddings, output_projection

logger = logging.getLogger(__name__)

DECAY = 0.8  # of the loss from head to head
DROPOUT = 0.1  # of the states
SHOWN = {"model_path", "start", "count", "new_tokens", "method", "heads", "layers", "plain", "vocabulary"}
SHOWN |= {"epochs", "batch", "learning_rate", "seed"}  # options that make the heads what they are


def main(
    prompts: Annotated[Path, typer.Option(help="JSONL with a prompt a line")],
    out: Annotated[Path, typer.Option(help="folder for the heads")],
    avoid: Annotated[
        list[Path] | None, typer.Option(help="benchmark files: their questions are not trained on")
    ] = None,
    model_path: str = "smollm2-135m",
    count: Annotated[int | None, typer.Option(help="prompts; by default all")] = None,
    new_tokens: Annotated[int, typer.Option(help="longest answer")] = 192,
    method: Annotated[str, typer.Option(help="by which the model answers: apar for one that forks")] = BASELINE,
    heads: int = 4,
    layers: int = 2,
    plain: Annotated[
        bool, typer.Option("--plain", help="read the state alone, as published layouts do, not the chosen token")
    ] = False,
    vocabulary: Annotated[int, typer.Option(help="tokens that heads guess from, the most used; 0: all")] = 8192,
    start: Annotated[
        Path | None, typer.Option(help="heads to go on from, such as of the model that this was tuned from")
    ] = None,
    epochs: float = 4,
    batch: Annotated[int, typer.Option(help="places a step")] = 1024,
    learning_rate: float = 2e-3,
    cache: Annotated[Path, typer.Option(help="answers, hidden states and checkpoints")] = Path("runs/training"),
    resume: Annotated[bool, typer.Option("--resume", help="go on with a training that was killed")] = False,
    seed: int = 0,
) -> None:
    """Answer the prompts, train the heads, measure them."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    chosen = load_prompts(prompts, benchmarks_of(avoid), count=count, seed=seed)
    learned = own_answers(model_path, chosen, new_tokens, cache / "answers.jsonl", method)
    device = find_device(None)
    checkpoint = load_checkpoint(model_path, dtype=find_dtype(None, device), device=device)
    options = {name: value for name, value in locals().items() if name in SHOWN}
    token_ids = most_used(learned, vocabulary, len(output_projection(checkpoint.model))) if vocabulary else None
    untrained = heads_to_train(checkpoint.model, token_ids, start, heads=heads, layers=layers, plain=plain)
    states = hidden_states(checkpoint.model, learned, len(untrained), cache, fast=True)
    trained, losses = train_heads(
        states,
        untrained,
        schedule=Schedule(max(1, int(epochs * len(states.states) / batch)), learning_rate),
        batch=batch,
        seed=seed,
        checkpoint=cache / f"medusa-{checkpoint.name}.pt",
        resume=resume,
        of=fingerprint(options, learned),
    )
    measured = accuracies(trained, held_out(states, token_ids))
    save_heads(trained, out, checkpoint.name)
    write_measures(measured, out)
    loss_curve(losses, out / "loss.png")
    (out / "provenance.json").write_text(json.dumps(provenance("training.medusa", options, prompts, learned), indent=1))


def heads_to_train(
    model: PreTrainedModel, token_ids: torch.Tensor | None, start: Path | None, *, heads: int, layers: int, plain: bool
) -> MedusaHeads:
    """Heads on ``model``'s projection of ``token_ids`` int64[V'] (None: all): blank ones, or those of ``start``.

    Raises:
        BadAdapter: those of ``start`` were made for another shape, or have projections of their own.
    """
    projection = output_projection(model).float()
    shared = projection if token_ids is None else projection[token_ids]
    embeddings = input_embeddings(model).float()
    if start is None:
        return MedusaHeads.blank(heads, layers, shared, token_ids, None if plain else embeddings)
    begun = load_heads(start, model).float()
    if begun.projection.ndim == 3:
        raise BadAdapter(f"{start}: heads with projections of their own are served, but not trained")
    return MedusaHeads(begun.weight, begun.bias, shared, token_ids, begun.token_weight, embeddings)


def train_heads(
    states: HiddenStates,
    heads: MedusaHeads,
    *,
    schedule: Schedule,
    batch: int,
    seed: int,
    checkpoint: Path,
    resume: bool,
    of: str = "",
    stop_at: int | None = None,
) -> tuple[MedusaHeads, list[float]]:
    """``heads``, trained, and the losses of their training; see :func:`training.loop.train`."""
    accelerator = Accelerator()
    made = heads.to(accelerator.device)
    examples = examples_of(states, made.token_ids, kept=~is_held_out(states))
    dtype = product_dtype(accelerator.device)
    rows = made.projection.to(dtype)

    def loss_of(step: int) -> torch.Tensor:
        places = np.sort(_places(step, batch, len(examples.states), seed))
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        kept = _kept_states(step, (len(places), states.states.shape[1]), seed)[mine].to(accelerator.device)
        places = places[mine]
        hidden, chosen, targets = examples.batch(places, accelerator.device)
        with fast_products(accelerator.device):
            features = made.features(hidden * kept, chosen)
        losses = [
            DECAY**head
            * vocabulary_loss(
                features[head], examples.teacher(places, head, accelerator.device), rows, targets[:, head] != -1, dtype
            )
            for head in range(len(made))
        ]
        return torch.stack(losses).sum()

    losses = train(made, loss_of, schedule, checkpoint, accelerator=accelerator, resume=resume, of=of, stop_at=stop_at)
    return made.cpu(), losses


def _kept_states(step: int, shape: tuple[int, int], seed: int) -> torch.Tensor:
    """float[B, h], what a step's states are multiplied with: 0 where they are dropped."""
    draws = torch.rand(shape, generator=torch.Generator().manual_seed((seed << 32) + step))
    return (draws >= DROPOUT) / (1 - DROPOUT)


def _places(step: int, batch: int, total: int, seed: int) -> np.ndarray:
    """The places of a step: every epoch is a new permutation."""
    per_epoch = max(1, total // batch)
    order = np.random.default_rng([seed, step // per_epoch]).permutation(total)
    return order[(step % per_epoch) * batch :][:batch]


if __name__ == "__main__":
    typer.run(main)
