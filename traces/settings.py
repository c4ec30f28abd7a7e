"""What one run of get_trace asks of the model."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RunSettings:
    """The model and how it is to decode; the same for all questions of a run."""

    model: str
    max_length: int = 2048  # prompt and answer together
    max_tokens: int | None = None  # of one answer
    temperature: float = 0.0
    seed: int | None = None
    method: str | None = None
    prompt_ids: bool = False  # traces with the prompt's token ids, which the legacy export needs

    def body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """The body of ``/v1/chat/completions`` for these messages."""
        asked = {"model": self.model, "method": self.method, **self._parameters()}
        trace = "full" if self.prompt_ids else True
        return {key: value for key, value in asked.items() if value is not None} | {
            "messages": messages,
            "trace": trace,
        }

    def identity(self) -> dict[str, Any]:
        """The keys of a record that results of one file share."""
        method = {"method": self.method} if self.method else {}
        return {"model": self.model, **method, "parameters": self._parameters()}

    def satisfied_by(self, record: dict[str, Any]) -> bool:
        """Whether the record's traces hold all that this run needs."""
        return not self.prompt_ids or all(trace["header"].get("prompt_token_ids") for trace in record["traces"])

    def _parameters(self) -> dict[str, Any]:
        return {
            "max_length": self.max_length,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
        }
