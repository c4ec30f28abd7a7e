"""How often prompt tokens guess right, by rank, and the trees that follow."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from training.answers import Answer
from training.head_accuracy import RANKS, write_accuracies
from training.prompt_rows import prompt_states, read_texts
from workers.decoding.dynamic_tree import trees_json
from workers.decoding.prompt_tokens import PromptTokens
from workers.decoding.tree_builder import build_tree
from workers.model.quantization import output_projection

STRIDE = 2  # places of an answer from one that is measured to the next
BUDGETS = (8, 16, 32, 64)  # rows of the trees, without the root and its chain


@torch.inference_mode()
def measured_accuracies(
    model: PreTrainedModel, tokens: PromptTokens, answers: Sequence[Answer], stride: int = STRIDE
) -> list[list[float]]:
    """[special token][rank]: how often the guess of that rank is the model's own token."""
    hits, counted = torch.zeros(len(tokens), RANKS), torch.zeros(len(tokens))
    projection = output_projection(model)
    for answer in answers:
        path = torch.tensor(answer.prompt + answer.answer)
        places = torch.arange(len(answer.prompt) - 1, len(path) - 1, stride)
        states = prompt_states(model, tokens, read_texts(model, [path.tolist()]), places[None].to(model.device))[0]
        best = (states.to(projection.dtype) @ projection.T).topk(RANKS).indices.cpu()
        for special in range(len(tokens)):
            there = places + 2 + special < len(path)
            right = best[there, special] == path[places[there] + 2 + special, None]
            hits[special] += right.sum(0)
            counted[special] += int(there.sum())
    measured: list[list[float]] = (hits / counted.clamp(min=1)[:, None]).tolist()
    return measured


def write_prompt_measures(measured: Sequence[Sequence[float]], folder: Path) -> None:
    """Accuracies [special token][rank], a picture of them, and the best trees of some sizes."""
    write_accuracies(measured, folder, "prompt token")
    trees = {f"rows_{rows}": build_tree(measured, rows) for rows in BUDGETS}
    (folder / "trees.json").write_text(trees_json(trees))
