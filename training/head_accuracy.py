"""How often heads guess right, by rank, and the tree that follows."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from training.examples import Examples
from training.pictures import accuracy_picture
from workers.decoding.heads import MedusaHeads
from workers.decoding.sparse_tree import search_tree

logger = logging.getLogger(__name__)

RANKS = 10  # of guesses whose accuracy is measured
TREE = 64


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


def write_measures(measured: Sequence[Sequence[float]], folder: Path) -> None:
    """Accuracies [head][rank], a picture of them, and the best tree that follows."""
    write_accuracies(measured, folder, "head")
    tree = [list(path) for path in search_tree(measured, TREE).paths]
    (folder / "tree.json").write_text(json.dumps(tree))


def write_accuracies(measured: Sequence[Sequence[float]], folder: Path, whose: str) -> None:
    """Accuracies [head][rank] and a picture of them; a line a head, or whatever it is, in the log."""
    for number, ranks in enumerate(measured):
        right, among = 100 * ranks[0], 100 * sum(ranks)
        logger.info("%s %d: %.1f %% right, %.1f %% in %d guesses", whose, number, right, among, RANKS)
    folder.mkdir(parents=True, exist_ok=True)
    accuracy_picture(measured, folder / "accuracies.png", whose)
    rounded = [[round(value, 4) for value in ranks] for ranks in measured]
    (folder / "accuracies.json").write_text(json.dumps(rounded))
