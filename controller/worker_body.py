"""The body of a generation request as each kind of worker takes it."""

from typing import Any

import httpx

from controller.calls import ask
from controller.conversation import render
from controller.settings import Settings
from controller.worker import ForeignCard, Worker
from protocol.errors import ErrorCode, RequestError
from protocol.fleet import ConvTemplate, ModelDetails, ModelQuery
from protocol.generation import GenerateParams
from protocol.wire import Wire

_FOREIGN_TO_FASTCHAT = {"messages", "method", "trace", "choice", "text_deltas", "max_length"}


class _ConvAnswer(Wire):
    conv: ConvTemplate


class _TokenCount(Wire):
    count: int


class BodyMaker:
    """Adapts requests to workers, asking FastChat's own workers for what only they know."""

    def __init__(self, client: httpx.AsyncClient, settings: Settings) -> None:
        self._client = client
        self._timeout_s = settings.worker_api_timeout_s

    async def body(self, worker: Worker, params: GenerateParams) -> dict[str, Any]:
        """JSON for ``/worker_generate_stream``: ours take the parameters as they are, FastChat's a rendered prompt.

        Raises:
            RequestError: the worker cannot do what is asked (a prompt beyond its context, an unknown role).
            WorkerFailed: it did not answer.
        """
        if worker.own:
            return params.model_dump(mode="json", exclude_none=True)
        return await self._for_fastchat(worker, params)

    async def _for_fastchat(self, worker: Worker, params: GenerateParams) -> dict[str, Any]:
        card = await self._card(worker, params.model or "")
        template = card.template
        prompt = params.prompt if params.prompt is not None else render(template, params.messages or [])
        stop_str = [template.stop_str] if isinstance(template.stop_str, str) else template.stop_str or []
        return params.model_dump(mode="json", exclude_none=True, exclude=_FOREIGN_TO_FASTCHAT) | {
            "prompt": prompt,
            "top_k": params.top_k or -1,
            "max_new_tokens": await self._room(worker, params, card.context_length, prompt),
            "stop": list(dict.fromkeys([*params.stop, *filter(None, stop_str)])),
            "stop_token_ids": list(dict.fromkeys([*params.stop_token_ids, *(template.stop_token_ids or [])])),
        }

    async def _card(self, worker: Worker, model: str) -> ForeignCard:
        """The model's template and context length; asked once a registration."""
        card = worker.cards.get(model)
        if card is None:
            query = ModelQuery(model=model)
            answer = await ask(self._client, worker, "/worker_get_conv_template", query, _ConvAnswer, self._timeout_s)
            details = await ask(self._client, worker, "/model_details", query, ModelDetails, self._timeout_s)
            card = worker.cards[model] = ForeignCard(answer.conv, details.context_length)
        return card

    async def _room(self, worker: Worker, params: GenerateParams, context_length: int, prompt: str) -> int:
        """How many tokens the answer may have, as FastChat's API server reckons."""
        query = ModelQuery(model=params.model, prompt=prompt)
        used = (await ask(self._client, worker, "/count_token", query, _TokenCount, self._timeout_s)).count
        room = min(context_length, params.max_length or context_length) - used
        if room <= 0:
            raise RequestError(
                ErrorCode.CONTEXT_OVERFLOW,
                f"the prompt has {used} tokens, which leaves no room in a context of {context_length}",
            )
        return min(room, params.max_new_tokens or room)
