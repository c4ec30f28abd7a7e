"""Tiny checkpoints and engines for tests."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.families import tiny_model
from tests.support.tokenizers import byte_tokenizer
from workers.engine import Engine
from workers.model.checkpoint import Checkpoint


@cache
def tiny_checkpoint(family: str = "llama", seed: int = 0) -> Checkpoint:
    """One model a family and seed; engines may share it, one after another."""
    return Checkpoint(f"tiny-{family}", tiny_model(family, seed), byte_tokenizer())


FORK, CHILD = 263, 264  # of the forking checkpoint


@cache
def forking_checkpoint() -> Checkpoint:
    """One whose tokenizer has control tokens; a bias on [Fork] makes it fork."""
    return Checkpoint("tiny", tiny_checkpoint().model, byte_tokenizer(added=["[Fork]", "[Child]"]))


def tiny_engine(family: str = "llama", **options: Any) -> Engine:
    """An engine with 4096 rows of KV unless told otherwise."""
    return Engine(lambda: tiny_checkpoint(family), **{"kv_tokens": 4096, **options})


def save_tiny(folder: Path, family: str = "llama", context: int = 512) -> Path:
    """A loadable checkpoint folder."""
    checkpoint = tiny_checkpoint(family)
    checkpoint.model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": context}))
    checkpoint.tokenizer.save_pretrained(folder)
    return folder
