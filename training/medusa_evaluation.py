"""``python -m training.medusa_evaluation``: how often heads guess right on known answers, and the tree that follows.

A replay: one forward pass over each prompt and the model's own answer gives every head's guesses at every place.
"""

import logging
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from training.answers import AnswerFile
from training.examples import examples_of
from training.head_accuracy import accuracies, write_measures
from training.hidden import hidden_states
from workers.decoding.interface import BadAdapter
from workers.decoding.medusa_checkpoint import load_heads
from workers.model.checkpoint import load_checkpoint


def main(
    adapter: Annotated[Path, typer.Argument(help="heads of any published layout")],
    answers: Annotated[Path, typer.Option(help="the model's own answers, as trainers and benchmarks keep them")],
    out: Annotated[Path, typer.Option(help="folder for accuracies.json, accuracies.png and tree.json")],
    model_path: str = "smollm2-135m",
) -> None:
    """Measure the heads."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    checkpoint = load_checkpoint(model_path, dtype=torch.float32, device=torch.device("cpu"))
    try:
        heads = load_heads(adapter, checkpoint.model)
    except BadAdapter as error:
        raise typer.BadParameter(str(error)) from None
    known = AnswerFile(answers).of(checkpoint.name)
    states = hidden_states(checkpoint.model, known, len(heads), answers.parent)
    measured = accuracies(heads, examples_of(states, heads.token_ids, kept=np.ones(len(states.states), dtype=bool)))
    write_measures(measured, out)


if __name__ == "__main__":
    typer.run(main)
