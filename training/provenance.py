"""Where trained weights came from."""

import hashlib
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from training.answers import Answer
from training.digest import answers_digest, short_digest


def provenance(command: str, options: Mapping[str, Any], prompts: Path, learned: Sequence[Answer]) -> dict[str, Any]:
    """What a trainer was run with, on what; digests tell whether another run would see the same.

    Args:
        command: the trainer's module.
        options: its settings by name; of absolute paths only the last name is told, not where it lay.
        prompts: the file of prompts.
        learned: the answers that it learned from.
    """
    told = {name: _without_folders(value) for name, value in options.items()}
    return {
        "command": " ".join([f"python -m {command}", *_words(told)]),
        "prompts": named(prompts),
        "answers": {
            "count": len(learned),
            "tokens": sum(len(answer.answer) for answer in learned),
            "sha256": answers_digest(learned),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": f"{platform.machine()} {sys.platform}",
    }


def fingerprint(options: Mapping[str, Any], learned: Sequence[Answer]) -> str:
    """Equal for two trainings that would see and do the same."""
    return short_digest(*_words(options), answers_digest(learned))


def named(file: Path) -> dict[str, str]:
    """A file's name and digest."""
    return {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def _without_folders(value: Any) -> Any:
    return Path(value).name if isinstance(value, str | Path) and Path(value).is_absolute() else value


def _words(options: Mapping[str, Any]) -> Iterator[str]:
    """Options as they are typed; those that are None or False are not."""
    for name, value in options.items():
        if value is not None and value is not False:
            yield f"--{name.replace('_', '-')}" + ("" if value is True else f" {shlex.quote(str(value))}")
