"""A method with its draft sizes, as benchmarks are told: ``ngram:nodes=7``, ``lookahead:window=7,level=5``."""

from dataclasses import dataclass
from typing import Any

import typer

from benchmarks.answers import Turn
from protocol.generation import DraftSettings
from workers.decoding.registry import UnknownMethod, check_method
from workers.engine import Engine


@dataclass(frozen=True)
class Setting:
    """``name`` is how the user wrote it."""

    name: str
    method: str
    draft: DraftSettings

    @classmethod
    def parse(cls, text: str) -> "Setting":
        """Read ``method:key=value,key=value``. Raises typer.BadParameter."""
        method, _, sizes = text.partition(":")
        try:
            check_method(method)
            pairs: dict[str, Any] = dict(size.split("=", 1) for size in sizes.split(",") if size)
            return cls(text, method, DraftSettings.model_validate(pairs))
        except (UnknownMethod, ValueError) as error:
            raise typer.BadParameter(f"{text}: {error}") from None


def decode(engine: Engine, setting: Setting, turn: Turn, **sampling: Any) -> list[list[int]]:
    """Token ids that each step emitted for a turn; greedy unless told otherwise."""
    options = {"temperature": 0, "max_new_tokens": turn.answer.new_tokens, **sampling}
    draft = setting.draft.model_dump(exclude_none=True)
    events = engine.generate(turn.messages, method=setting.method, draft=draft, **options)
    return [event.step.threads[0].token_ids for event in events if event.step]
