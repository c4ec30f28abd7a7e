"""``python -m training.medusa``: heads for any model, from its own answers to prompts (self-distillation, Medusa-1).

The base stays as it is. Answers, and the last hidden states behind them, are computed once and kept; heads learn from
these with weights 0.8^k on answers alone, over the tokens that the model uses most. Beside the heads the folder gets
their accuracies on answers held out, the trees that follow, the loss curve, and where all of it came from.
"""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from accelerate import Accelerator
from safetensors.torch import save_file

from training.answers import Answer, AnswerFile, answers
from training.hidden import HiddenStates, hidden_states
from training.loop import Schedule, train
from training.pictures import accuracy_picture, loss_curve
from training.precision import fast_products, has_fast_bfloat16
from training.prompts import Benchmarks, load_prompts, read_questions
from training.provenance import provenance
from training.vocabulary_loss import vocabulary_loss
from workers.decoding.heads import MedusaHeads
from workers.decoding.medusa_checkpoint import TOKEN_MAP, TOKEN_WEIGHT
from workers.decoding.sparse_tree import search_tree
from workers.engine import Engine
from workers.model.checkpoint import load_checkpoint
from workers.model.devices import find_device, find_dtype
from workers.model.quantization import input_embeddings, output_projection
from workers.warm_up import WarmUp

logger = logging.getLogger(__name__)

DECAY = 0.8
RANKS = 10  # of guesses whose accuracy is measured
HELD_OUT = 0.05
TREE = 64
SHOWN = (
    "model_path",
    "count",
    "new_tokens",
    "heads",
    "layers",
    "plain",
    "vocabulary",
    "epochs",
    "batch",
    "learning_rate",
    "seed",
)


@dataclass(frozen=True)
class Examples:
    """Places to learn from.

    Attributes:
        states: float16[N, h]; chosen: int64[N], the token that each of them chose.
        targets: int64[N, heads], the projection's row of each token ahead; -1 behind the answer's end, -2 for a token
            that the projection lacks.
    """

    states: np.ndarray
    chosen: torch.Tensor
    targets: torch.Tensor

    def batch(self, places: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """float32[B, h], int64[B] and int64[B, heads]."""
        places = np.sort(places)
        states = torch.from_numpy(self.states[places].astype(np.float32))
        rows = torch.from_numpy(places)
        return states.to(device), self.chosen[rows].to(device), self.targets[rows].to(device)


def main(
    prompts: Annotated[Path, typer.Option(help="JSONL with a prompt a line")],
    out: Annotated[Path, typer.Option(help="folder for the heads")],
    avoid: Annotated[
        list[Path] | None, typer.Option(help="benchmark files: their questions are not trained on")
    ] = None,
    model_path: str = "smollm2-135m",
    count: Annotated[int | None, typer.Option(help="prompts; by default all")] = 2000,
    new_tokens: Annotated[int, typer.Option(help="longest answer")] = 192,
    heads: int = 4,
    layers: int = 2,
    plain: Annotated[
        bool, typer.Option("--plain", help="read the state alone, as published layouts do, not the chosen token")
    ] = False,
    vocabulary: Annotated[int, typer.Option(help="tokens that heads guess from, the most used; 0: all")] = 8192,
    epochs: float = 4,
    batch: Annotated[int, typer.Option(help="places a step")] = 1024,
    learning_rate: float = 2e-3,
    cache: Annotated[Path, typer.Option(help="answers, hidden states and checkpoints")] = Path("runs/training"),
    resume: Annotated[bool, typer.Option("--resume", help="go on with a training that was killed")] = False,
    seed: int = 0,
) -> None:
    """Answer the prompts, train the heads, measure them."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    benchmarks = Benchmarks(read_questions(avoid or []))
    chosen = load_prompts(prompts, benchmarks, count=count, seed=seed, longest=1200)
    learned = own_answers(model_path, chosen, new_tokens, cache / "answers.jsonl")
    device = find_device(None)
    checkpoint = load_checkpoint(model_path, dtype=find_dtype(None, device), device=device)
    states = hidden_states(checkpoint.model, learned, heads, cache, fast=True)
    options = {name: value for name, value in locals().items() if name in SHOWN}
    projection = output_projection(checkpoint.model).float()
    token_ids = most_used(learned, vocabulary, len(projection)) if vocabulary else None
    trained, losses = train_heads(
        states,
        projection,
        token_ids,
        None if plain else input_embeddings(checkpoint.model).float(),
        heads=heads,
        layers=layers,
        schedule=Schedule(max(1, int(epochs * len(states.states) / batch)), learning_rate),
        batch=batch,
        seed=seed,
        checkpoint=cache / f"medusa-{checkpoint.name}.pt",
        resume=resume,
    )
    measured = accuracies(trained, held_out(states, token_ids))
    save(trained, out, checkpoint.name)
    write_measures(measured, out)
    loss_curve(losses, out / "loss.png")
    (out / "provenance.json").write_text(json.dumps(provenance("training.medusa", options, prompts, learned), indent=1))


def own_answers(model_path: str, prompts: Sequence[str], new_tokens: int, path: Path) -> list[Answer]:
    """The model's answers, with the engine that serves; decoded once."""
    with Engine.load(model_path, kv_tokens=65536, max_requests=64) as engine:
        WarmUp(engine, model_path, measure=False).wait()

        def progress(done: int) -> None:
            if done % 100 == 0:
                logger.info("%d of %d prompts answered", done, len(prompts))

        found = answers(engine, prompts, new_tokens, AnswerFile(path), progress)
        return [answer for answer in found if len(answer.answer) > 1]


def most_used(learned: Sequence[Answer], size: int, vocabulary: int) -> torch.Tensor:
    """int64[V'], ascending: the tokens that the model's answers hold most often, then those of the prompts."""
    counts = Counter(token for answer in learned for token in answer.answer)
    for answer in learned:
        counts.update(dict.fromkeys(answer.prompt, 0))
    tokens = [token for token, _ in counts.most_common(min(size, vocabulary))]
    return torch.tensor(sorted(tokens))


def train_heads(
    states: HiddenStates,
    projection: torch.Tensor,
    token_ids: torch.Tensor | None,
    embeddings: torch.Tensor | None,
    *,
    heads: int,
    layers: int,
    schedule: Schedule,
    batch: int,
    seed: int,
    checkpoint: Path,
    resume: bool,
    stop_at: int | None = None,
) -> tuple[MedusaHeads, list[float]]:
    """New heads on ``projection`` float[V, h] and the losses of their training; see :func:`training.loop.train`.

    With ``embeddings`` float[V, h] they read the chosen token too.
    """
    accelerator = Accelerator()
    shared = projection if token_ids is None else projection[token_ids]
    made = MedusaHeads.blank(heads, layers, shared, token_ids, embeddings).to(accelerator.device)
    examples = examples_of(states, token_ids, kept=~_is_held_out(states))
    dtype = torch.bfloat16 if has_fast_bfloat16(accelerator.device) else torch.float32
    rows = made.projection.to(dtype)

    def loss_of(step: int) -> torch.Tensor:
        places = _places(step, batch, len(examples.states), seed)
        mine = places[accelerator.process_index :: accelerator.num_processes]
        hidden, chosen, targets = examples.batch(mine, accelerator.device)
        with fast_products(accelerator.device):
            features = made.features(hidden, chosen)
        losses = [
            DECAY**head * vocabulary_loss(features[head], rows, wanted, dtype) for head, wanted in enumerate(targets.T)
        ]
        return torch.stack(losses).sum()

    losses = train(made, loss_of, schedule, checkpoint, accelerator=accelerator, resume=resume, stop_at=stop_at)
    return made.cpu(), losses


def _places(step: int, batch: int, total: int, seed: int) -> np.ndarray:
    """The places of a step: every epoch is a new permutation."""
    per_epoch = max(1, total // batch)
    order = np.random.default_rng([seed, step // per_epoch]).permutation(total)
    return order[(step % per_epoch) * batch :][:batch]


def _is_held_out(states: HiddenStates) -> np.ndarray:
    """bool[N]: places of the last answers."""
    first: np.ndarray = states.answer >= int((1 - HELD_OUT) * (1 + states.answer.max()))
    return first


def held_out(states: HiddenStates, token_ids: torch.Tensor | None) -> Examples:
    """Places that were not trained on."""
    return examples_of(states, token_ids, kept=_is_held_out(states))


def examples_of(states: HiddenStates, token_ids: torch.Tensor | None, kept: np.ndarray) -> Examples:
    """The places where ``kept`` bool[N] is true, for heads over ``token_ids`` (None: all tokens)."""
    targets = torch.from_numpy(states.following[kept].astype(np.int64))
    if token_ids is not None:
        places = torch.full((int(max(targets.max(), token_ids.max())) + 2,), -2)  # no row: never right
        places[token_ids] = torch.arange(len(token_ids))
        places[-1] = -1  # behind the answer's end: not counted
        targets = places[targets]
    return Examples(states.states[kept], torch.from_numpy(states.chosen[kept].astype(np.int64)), targets)


@torch.inference_mode()
def accuracies(heads: MedusaHeads, examples: Examples, batch: int = 1024) -> list[list[float]]:
    """[head][rank]: how often the guess of that rank is right."""
    hits = torch.zeros(len(heads), RANKS)
    counted = torch.zeros(len(heads))
    for start in range(0, len(examples.states), batch):
        places = np.arange(start, min(start + batch, len(examples.states)))
        hidden, chosen, targets = examples.batch(places, heads.weight.device)
        best = heads.logits(hidden, chosen).topk(min(RANKS, heads.projection.shape[-2]), dim=-1).indices
        for head in range(len(heads)):
            hits[head, : best.shape[-1]] += (best[head] == targets[:, head, None]).sum(0)
            counted[head] += (targets[:, head] != -1).sum()
    measured: list[list[float]] = (hits / counted.clamp(min=1)[:, None]).tolist()
    return measured


def save(heads: MedusaHeads, folder: Path, base: str) -> None:
    """Heads in bfloat16 in the layout of "version 2"."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {} if heads.token_weight is None else {TOKEN_WEIGHT: heads.token_weight.detach().to(torch.bfloat16)}
    tensors |= {
        f"{head}.{layer}.linear.{name}": getattr(heads, name)[layer, head].detach().to(torch.bfloat16).contiguous()
        for layer in range(len(heads.weight))
        for head in range(len(heads))
        for name in ("weight", "bias")
    }
    if heads.token_ids is not None:
        tensors[TOKEN_MAP] = heads.token_ids.to(torch.int32)
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    config: dict[str, Any] = {"version": "2", "base_model_name_or_path": base}
    config |= {"medusa_num_heads": len(heads), "medusa_num_layers": len(heads.weight)}
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def write_measures(measured: Sequence[Sequence[float]], folder: Path) -> None:
    """Accuracies [head][rank], a picture of them, and the best tree that follows; a line a head in the log."""
    for head, ranks in enumerate(measured):
        logger.info("head %d: %.1f %% right, %.1f %% in %d guesses", head, 100 * ranks[0], 100 * sum(ranks), RANKS)
    folder.mkdir(parents=True, exist_ok=True)
    accuracy_picture(measured, folder / "accuracies.png")
    rounded = [[round(value, 4) for value in ranks] for ranks in measured]
    (folder / "accuracies.json").write_text(json.dumps(rounded))
    tree = [list(path) for path in search_tree(measured, TREE).paths]
    (folder / "tree.json").write_text(json.dumps(tree))


if __name__ == "__main__":
    typer.run(main)
