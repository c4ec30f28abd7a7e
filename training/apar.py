"""``python -m training.apar``: teach a model to fork (APAR, Liu et al. 2024), by LoRA or by all of its weights.

``prepare`` makes the data from chats. The training packs paragraph trees; half of the samples are answers that must not
fork. Beside the adapter the folder gets the loss curve and where all of it came from.
"""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from protocol.generation import ChatMessage
from training.answers import Answer, answers_of
from training.apar_data import Chat, Sample, read_chats, read_plain, read_trees, sorted_out, told_apart, write_data
from training.loop import Schedule, train
from training.own_threads import own_tree
from training.paragraph_tree import ParagraphTree, packed, tree_of
from training.pictures import bar_picture, loss_curve
from training.precision import product_dtype
from training.prompts import benchmarks_of, load_prompts
from training.provenance import fingerprint, named, provenance
from workers.decoding.registry import BASELINE
from workers.forking import NAMES, ControlTokens
from workers.model.checkpoint import Checkpoint, load_checkpoint
from workers.model.devices import find_device
from workers.model.lora import ADDED_TOKENS, add_tokens
from workers.prompts import PromptRenderer

logger = logging.getLogger(__name__)

SHOWN = {"model_path", "start", "full", "rank", "longest", "steps", "trees", "learning_rate", "seed"}

SOURCES = "sources.json"  # of prepared data
PROVENANCE = "provenance.json"
WEIGHTS = "adapter_model.safetensors"  # as PEFT names it

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Trained(nn.Module):
    """The parameters of a model that are trained, for checkpoints."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parameters_ = nn.ParameterList(parameter for parameter in model.parameters() if parameter.requires_grad)


def with_lora(model: PreTrainedModel, tokens: Sequence[int], rank: int, start: Path | None = None) -> Any:
    """``model`` with trainable LoRA on its decoder's linear layers, and trainable rows of ``tokens``.

    Args:
        start: a folder with such an adapter, to go on from; it has its own rank.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if start:
        return PeftModel.from_pretrained(model, str(start), is_trainable=True)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [name.rpartition(".")[2] for table in tables for name, module in model.named_modules() if module is table]
    tied = tables[0].weight is tables[1].weight
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        trainable_token_indices={name: list(tokens) for name in names[: 1 if tied else 2]},
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Write the trained parameters in 16 bits; ``base`` is the name of the model that they are merged in."""
    for parameter in Trained(model).parameters():
        parameter.data = parameter.data.half()
    model.peft_config["default"].base_model_name_or_path = base  # not where it lay here
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's blank form


def origin_of(adapter: Path) -> Any:
    """What the provenance file in a folder says; None where there is none."""
    path = adapter / PROVENANCE
    return json.loads(path.read_text()) if path.is_file() else None


def train_forking(
    model: Any,
    forking: Sequence[ParagraphTree],
    plain: Sequence[ParagraphTree],
    *,
    trees: int,
    schedule: Schedule,
    seed: int,
    checkpoint: Path,
    resume: bool,
    of: str = "",
    stop_at: int | None = None,
) -> list[float]:
    """Train ``model``'s trainable parameters; returns the losses; see :func:`training.loop.train`.

    Args:
        forking, plain: samples that fork, and that must not; half of each step's ``trees`` are of either kind.
    """
    accelerator = Accelerator()

    def loss_of(step: int) -> torch.Tensor:
        draws = np.random.default_rng([seed, step])
        drawn = [
            kind[int(draws.integers(len(kind)))]
            for kind in ([forking, plain] * trees if plain else [forking] * trees)[:trees]
        ]
        mine = drawn[accelerator.process_index :: accelerator.num_processes]
        return tree_loss(model, mine)

    return train(
        Trained(model), loss_of, schedule, checkpoint, accelerator=accelerator, resume=resume, of=of, stop_at=stop_at
    )


def tree_loss(model: Any, trees: Sequence[ParagraphTree]) -> torch.Tensor:
    """Mean cross entropy over the labels of packed trees."""
    batch = packed(trees)
    device = next(model.parameters()).device
    rows = (batch.labels >= 0).nonzero()[:, 0]
    output = model(
        input_ids=batch.ids.to(device),
        position_ids=batch.positions.to(device),
        attention_mask=_additive(batch.mask, model.dtype).to(device),
        use_cache=False,
        logits_to_keep=rows.to(device),
    )
    return cross_entropy(output.logits[0].float(), batch.labels[rows].to(device))


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)


def encoded(
    samples: Sequence[Sample], checkpoint: Checkpoint, control: ControlTokens, longest: int
) -> list[ParagraphTree]:
    """Samples behind their rendered prompts, without those of more than ``longest`` tokens."""
    renderer = PromptRenderer(checkpoint.tokenizer, checkpoint.name)
    trees = []
    for sample in samples:
        prompt = renderer.render([ChatMessage(role="user", content=sample.prompt)]).token_ids
        trees.append(tree_of(prompt, sample.answer, checkpoint.tokenizer, control))
    kept = [tree for tree in trees if len(tree) <= longest]
    logger.info("%d samples of at most %d tokens, %d forks", len(kept), longest, sum(len(tree.forks) for tree in kept))
    return kept


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    data: Annotated[Path, typer.Option(help="folder with apar.json and unstructured.json, see prepare")] = Path("data"),
    out: Annotated[Path, typer.Option(help="folder for the adapter")] = Path("apar"),
    model_path: str = "smollm2-135m",
    start: Annotated[Path | None, typer.Option(help="folder of an adapter that forks already, to go on from")] = None,
    full: Annotated[bool, typer.Option("--full", help="train all weights; the folder becomes a model")] = False,
    rank: Annotated[int, typer.Option(min=1, help="of LoRA")] = 16,
    longest: Annotated[int, typer.Option(help="tokens of a sample")] = 1024,
    steps: int = 400,
    trees: Annotated[int, typer.Option(min=2, help="samples a step, half of which fork")] = 4,
    learning_rate: float = 5e-4,
    cache: Annotated[Path, typer.Option(help="checkpoints")] = Path("runs/training"),
    resume: Annotated[bool, typer.Option("--resume", help="go on with a training that was killed")] = False,
    seed: int = 0,
) -> None:
    """Teach a model to fork."""
    if context.invoked_subcommand:
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    options = {name: value for name, value in locals().items() if name in SHOWN}
    if full and start:
        raise typer.BadParameter("--full trains all weights, --start goes on from an adapter: give one of them")
    device = find_device(None)
    dtype = torch.float32 if full else product_dtype(device)
    checkpoint = load_checkpoint(model_path, dtype=dtype, device=device)
    added = add_tokens(checkpoint.model, checkpoint.tokenizer, list(NAMES[0]))
    control = ControlTokens(fork=added[NAMES[0][0]], child=added[NAMES[0][1]])
    forking = encoded(read_trees(data / "apar.json"), checkpoint, control, longest)
    plain = encoded(read_plain(data / "unstructured.json"), checkpoint, control, longest)
    if not forking:
        raise typer.BadParameter(f"{data / 'apar.json'}: no answer of at most {longest} tokens forks")
    model: Any = checkpoint.model if full else with_lora(checkpoint.model, list(added.values()), rank, start)
    begun = origin_of(start) if start else None
    learned = [Answer(checkpoint.name, longest, list(tree.prompt), tree.tokens, "") for tree in [*forking, *plain]]
    losses = train_forking(
        model,
        forking,
        plain,
        trees=trees,
        schedule=Schedule(steps, learning_rate),
        seed=seed,
        checkpoint=cache / f"apar-{checkpoint.name}.pt",
        resume=resume,
        of=fingerprint(options, learned),
    )
    if full:
        model.save_pretrained(out)
        checkpoint.tokenizer.save_pretrained(out)
    else:
        save_adapter(model, out, checkpoint.name)
    (out / ADDED_TOKENS).write_text(json.dumps(added))
    loss_curve(losses, out / "loss.png")
    origin = provenance("training.apar", options, data / "apar.json", learned)
    origin["data"] = json.loads((data / SOURCES).read_text()) if (data / SOURCES).is_file() else None
    origin["start"] = begun
    (out / PROVENANCE).write_text(json.dumps(origin, indent=1))


@app.command("prepare")
def prepare(
    out: Annotated[Path, typer.Option(help="folder for apar.json, apar_flatten.json, unstructured.json")],
    chats: Annotated[list[Path] | None, typer.Option(help="JSON or JSONL of chats, or of prompt and answer")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSONL of prompts that the model itself answers")] = None,
    avoid: Annotated[list[Path] | None, typer.Option(help="benchmark files: their questions are left out")] = None,
    model_path: str = "smollm2-135m",
    count: Annotated[int | None, typer.Option(help="prompts; by default all")] = None,
    new_tokens: Annotated[int, typer.Option(help="longest of the model's answers")] = 192,
    method: Annotated[str, typer.Option(help="by which the model answers: apar for one that forks")] = BASELINE,
    cache: Annotated[Path, typer.Option(help="the model's answers")] = Path("runs/training"),
    seed: int = 0,
) -> None:
    """Sort answers out into those that fork and those that must not, in the published formats."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    benchmarks = benchmarks_of(avoid)
    found = [chat for path in chats or [] for chat in read_chats(path) if not benchmarks.holds(chat.prompt)]
    trees: list[Sample | None] = []  # of what the model said in threads
    if prompts:
        chosen = load_prompts(prompts, benchmarks, count=count, seed=seed)
        answers = answers_of(model_path, chosen, new_tokens, cache / "answers.jsonl", method)
        tokenizer = load_checkpoint(model_path, dtype=torch.bfloat16, device=torch.device("cpu")).tokenizer
        for number, (prompt, threads) in enumerate(zip(chosen, answers, strict=True)):
            if len(threads) > 1:
                trees.append(own_tree(f"own{number}", prompt, threads, tokenizer))
            else:
                cut = len(threads[0].answer) == new_tokens
                found.append(Chat(f"own{number}", prompt, threads[0].text, cut=cut, own=True))
    structured, unstructured = sorted_out(told_apart(found))
    structured += [tree for tree in trees if tree]
    write_data(structured, unstructured, out)
    counts = Counter(len(sample.answer.details) for sample in structured)
    sizes = sorted(counts)
    bar_picture([0, *sizes], [len(unstructured), *(counts[size] for size in sizes)], "forks", out / "forks.png")
    told = {
        "files": [named(path) for path in [*(chats or []), *([prompts] if prompts else []), *(avoid or [])]],
        "answers": {"all": len(found) + len(trees), "fork": len(structured), "must not": len(unstructured)},
    }
    (out / SOURCES).write_text(json.dumps(told, indent=1))
    logger.info("%d answers: %d fork, %d must not", len(found), len(structured), len(unstructured))


@app.command("average")
def average(
    one: Annotated[Path, typer.Argument(help="folder of an adapter")],
    other: Annotated[Path, typer.Argument(help="of one that went on from it")],
    out: Annotated[Path, typer.Option(help="folder for their average")],
    share: Annotated[float, typer.Option(min=0, max=1, help="of the other")] = 0.5,
) -> None:
    """Average the weights of two adapters of one training: between what either does (Wortsman et al. 2022)."""
    tensors, others = (load_file(folder / WEIGHTS) for folder in (one, other))
    if {name: tensor.shape for name, tensor in tensors.items()} != {name: each.shape for name, each in others.items()}:
        raise typer.BadParameter(f"{one} and {other} are not adapters of the same shape")
    origin = {
        "command": f"python -m training.apar average --share {share}",
        "of": [origin_of(one), origin_of(other)],
    }
    out.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_config.json", ADDED_TOKENS):
        (out / name).write_bytes((one / name).read_bytes())
    averaged = {name: tensor.float().lerp(others[name].float(), share).half() for name, tensor in tensors.items()}
    save_file(averaged, out / WEIGHTS, metadata={"format": "pt"})
    (out / PROVENANCE).write_text(json.dumps(origin, indent=1))


if __name__ == "__main__":
    app()
