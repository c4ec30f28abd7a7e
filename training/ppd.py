"""``python -m training.ppd``: prompt tokens for any model, from its own answers to prompts (PPD, Chen et al. 2024).

The base stays as it is. Teacher and prompt tokens speak in the same pass over an answer, with many chains of prompt
rows at once; the loss is the divergence of what they say, with weights 0.8^i. Beside the prompt tokens the folder gets
their accuracies on answers held out, the trees that follow, the loss curve, and where all of it came from.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Annotated

import numpy as np
import torch
import typer
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from training.answers import Answer, own_answers
from training.cut_conversations import cut_conversations
from training.examples import HELD_OUT
from training.loop import Schedule, train
from training.pictures import loss_curve
from training.precision import product_dtype
from training.prompt_accuracy import measured_accuracies, write_prompt_measures
from training.prompt_rows import prompt_states, read_texts
from training.prompts import benchmarks_of, load_prompts
from training.provenance import fingerprint, provenance
from training.vocabulary_loss import vocabulary_loss
from workers.decoding.ppd_checkpoint import load_prompt_tokens, save_prompt_tokens
from workers.decoding.prompt_tokens import ATTENTIONS, Attention, PromptTokens
from workers.decoding.registry import BASELINE
from workers.model.checkpoint import load_checkpoint
from workers.model.devices import find_device
from workers.model.quantization import input_embeddings, output_projection

logger = logging.getLogger(__name__)

DECAY = 0.8  # of the loss from special token to special token
NOISE = 0.01  # that virtual tokens of one special token start apart
SHOWN = {"model_path", "start", "words", "count", "new_tokens", "method", "special", "virtual", "attention"}
SHOWN |= {"steps", "texts", "places", "learning_rate", "seed"}  # options that make the tokens what they are


def main(
    out: Annotated[Path, typer.Option(help="folder for the prompt tokens")],
    prompts: Annotated[Path | None, typer.Option(help="JSONL with a prompt a line")] = None,
    conversations: Annotated[
        Path | None, typer.Option(help="instead, as published: JSON of chats, each cut at one place")
    ] = None,
    words: Annotated[str, typer.Option(help="what follows a cut: the model's words, or the data's")] = "model",
    avoid: Annotated[
        list[Path] | None, typer.Option(help="benchmark files: their questions are not trained on")
    ] = None,
    model_path: str = "smollm2-135m",
    count: Annotated[int | None, typer.Option(help="prompts; by default all")] = None,
    new_tokens: Annotated[int, typer.Option(help="longest answer")] = 192,
    method: Annotated[str, typer.Option(help="by which the model answers: apar for one that forks")] = BASELINE,
    special: Annotated[int, typer.Option(min=1, help="S, tokens ahead that are guessed")] = 3,
    virtual: Annotated[int, typer.Option(min=1, help="v, rows for each of them")] = 1,
    attention: Annotated[str, typer.Option(help=", ".join(ATTENTIONS))] = "ensemble",
    start: Annotated[
        Path | None,
        typer.Option(help="prompt tokens to go on from, such as of the model that this was tuned from"),
    ] = None,
    steps: int = 2000,
    texts: Annotated[int, typer.Option(min=1, help="answers a step")] = 2,
    places: Annotated[int, typer.Option(min=1, help="places of an answer that a step learns from")] = 48,
    learning_rate: float = 0.04,
    cache: Annotated[Path, typer.Option(help="answers and checkpoints")] = Path("runs/training"),
    resume: Annotated[bool, typer.Option("--resume", help="go on with a training that was killed")] = False,
    seed: int = 0,
) -> None:
    """Answer the prompts, train the prompt tokens, measure them."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if attention not in ATTENTIONS:
        raise typer.BadParameter(f"--attention {attention}: known are {', '.join(ATTENTIONS)}")
    source = prompts or conversations
    if source is None or (prompts and conversations) or words not in ("model", "data"):
        raise typer.BadParameter("give --prompts, or --conversations with --words model or data")
    options = {name: value for name, value in locals().items() if name in SHOWN}
    benchmarks = benchmarks_of(avoid)
    if prompts:
        chosen = load_prompts(prompts, benchmarks, count=count, seed=seed)
        answered = own_answers(model_path, chosen, new_tokens, cache / "answers.jsonl", method)
    device = find_device(None)
    checkpoint = load_checkpoint(model_path, dtype=product_dtype(device), device=device)
    if conversations:
        kept = cache / "cut_answers.jsonl"
        answered = cut_conversations(
            conversations, checkpoint, benchmarks, special=special, own=words == "model", seed=seed, cache=kept
        )[:count]
    first = int((1 - HELD_OUT) * len(answered))
    blank = blank_tokens(checkpoint.model, special, virtual, attention, seed)
    untrained = load_prompt_tokens(start, checkpoint.model) if start else blank
    learned, losses = train_prompt_tokens(
        checkpoint.model,
        answered[:first],
        untrained,
        texts=texts,
        places=places,
        schedule=Schedule(steps, learning_rate),
        seed=seed,
        checkpoint=cache / f"ppd-{checkpoint.name}.pt",
        resume=resume,
        of=fingerprint(options, answered),
    )
    save_prompt_tokens(learned, out, checkpoint.name)
    write_prompt_measures(measured_accuracies(checkpoint.model, learned, answered[first:]), out)
    loss_curve(losses, out / "loss.png")
    (out / "provenance.json").write_text(json.dumps(provenance("training.ppd", options, source, answered), indent=1))


def blank_tokens(model: PreTrainedModel, special: int, virtual: int, attention: Attention, seed: int) -> PromptTokens:
    """Prompt tokens that say nothing yet: all near the mean of the model's embeddings."""
    mean = input_embeddings(model).float().mean(0)
    noise = torch.randn(special, virtual, len(mean), generator=torch.Generator().manual_seed(seed))
    return PromptTokens(mean + NOISE * noise.to(mean.device), attention)


def train_prompt_tokens(
    model: PreTrainedModel,
    answers: Sequence[Answer],
    tokens: PromptTokens,
    *,
    texts: int,
    places: int,
    schedule: Schedule,
    seed: int,
    checkpoint: Path,
    resume: bool,
    of: str = "",
    stop_at: int | None = None,
) -> tuple[PromptTokens, list[float]]:
    """Prompt tokens trained from ``tokens``, and the losses of their training; see :func:`training.loop.train`.

    Args:
        texts: answers that a step learns from; places: chains of prompt rows in each of them, at most.
    """
    accelerator = Accelerator()
    model.requires_grad_(False)
    module = _Embeddings(tokens.embeddings.to(accelerator.device, torch.float32))
    seen, started = 0, perf_counter()

    def loss_of(step: int) -> torch.Tensor:
        nonlocal seen
        draws = np.random.default_rng([seed, step])
        drawn = [answers[number] for number in draws.integers(len(answers), size=texts)]
        chosen = torch.stack([_places(answer, len(tokens), places, draws) for answer in drawn])
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        seen += chosen.numel() * len(tokens)
        own = PromptTokens(module.embeddings, tokens.attention)
        return _loss(model, own, drawn[mine], chosen[mine].to(model.device))

    losses = train(
        module, loss_of, schedule, checkpoint, accelerator=accelerator, resume=resume, of=of, stop_at=stop_at
    )
    logger.info("%d prompt tokens trained, %.0f a second", seen, seen / (perf_counter() - started))
    return PromptTokens(module.embeddings.detach().cpu(), tokens.attention), losses


class _Embeddings(nn.Module):
    """All that is trained."""

    def __init__(self, embeddings: torch.Tensor) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(embeddings.clone())


def _places(answer: Answer, special: int, count: int, draws: np.random.Generator) -> torch.Tensor:
    """int64[K]: places of an answer behind which a whole chain has tokens to foresee, some twice in short answers."""
    first = len(answer.prompt) - 1
    behind = max(first + 1, first + len(answer.answer) - special)
    return torch.from_numpy(np.sort(draws.choice(np.arange(first, behind), count, replace=count > behind - first)))


def _loss(
    model: PreTrainedModel,
    tokens: PromptTokens,
    answers: Sequence[Answer],
    places: torch.Tensor,
) -> torch.Tensor:
    """Cross entropy with what the model itself says where the prompt tokens stand, behind places int64[B, K]."""
    paths = [answer.prompt + answer.answer for answer in answers]
    ends = torch.tensor([len(path) for path in paths], device=places.device)[:, None]
    texts = read_texts(model, paths)
    foreseen = prompt_states(model, tokens, texts, places).float()
    projection = output_projection(model)
    total = foreseen.new_zeros(())
    for special in range(len(tokens)):
        there = places + 1 + special < ends
        rows = (places + 1 + special).clamp(max=texts.states.shape[1] - 1)
        teacher = texts.states.gather(1, rows[..., None].expand(-1, -1, texts.states.shape[2])).float()
        total = total + DECAY**special * vocabulary_loss(
            foreseen[:, :, special].flatten(0, 1), teacher.flatten(0, 1), projection, there.flatten(), projection.dtype
        )
    return total


if __name__ == "__main__":
    typer.run(main)
