"""OpenAI's endpoints: models, chat completions and completions, streamed or whole."""

import json
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.responses import Response

from controller.choices import UsageTally, merged
from controller.openai_format import DONE, AnswerFormat, ChatFormat, TextFormat, event, to_json
from controller.pieces import Piece
from controller.replies import HeldResponse, request_id
from controller.services import Services
from controller.upstream import Call
from controller.worker import Worker
from protocol.errors import ErrorCode, RequestError
from protocol.generation import GenerateParams, SamplingFields
from protocol.openai import (
    MAX_CHOICES,
    ChatCompletionRequest,
    CompletionRequest,
    ErrorBody,
    ErrorReply,
    ModelCard,
    ModelList,
)
from protocol.wire import parse_body

log = logging.getLogger(__name__)

OpenAIRequest = ChatCompletionRequest | CompletionRequest
Arrivals = AsyncIterator[tuple[int, Piece]]


def openai_door(services: Services) -> APIRouter:
    """The ``/v1`` routes."""
    router = APIRouter(prefix="/v1")

    @router.get("/models")
    async def list_models() -> ModelList:
        return ModelList(data=[_card(services, name) for name in services.registry.models()])

    @router.get("/models/{model:path}")
    async def retrieve_model(model: str) -> ModelCard:
        if model not in services.registry.models():
            raise services.registry.nobody_serves(model)
        return _card(services, model)

    @router.post("/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = parse_body(ChatCompletionRequest, await request.body())
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        prompt = GenerateParams(messages=body.messages, echo=False, logprobs=logprobs, **_sampling(body))
        return _reply(services, request, body, [prompt], ChatFormat(body.model, request_id(request)))

    @router.post("/completions")
    async def completions(request: Request) -> Response:
        body = parse_body(CompletionRequest, await request.body())
        texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        if len(texts) * body.n > MAX_CHOICES:
            raise RequestError(ErrorCode.PARAM_OUT_OF_RANGE, f"prompt: more than {MAX_CHOICES} choices in all")
        prompts = [
            GenerateParams(prompt=text, echo=body.echo, logprobs=body.logprobs, **_sampling(body)) for text in texts
        ]
        return _reply(services, request, body, prompts, TextFormat(body.model, request_id(request)))

    return router


def _card(services: Services, name: str) -> ModelCard:
    workers = services.registry.serving(name)
    methods = dict.fromkeys(method for worker in workers for method in worker.status.methods)
    return ModelCard(id=name, created=min((worker.registered for worker in workers), default=0), methods=list(methods))


def _sampling(body: OpenAIRequest) -> dict[str, object]:
    """What both kinds of request and the worker's parameters have in common, and what is the same for all."""
    shared = {name: getattr(body, name) for name in SamplingFields.model_fields}
    return shared | {"model": body.model, "max_new_tokens": body.max_new_tokens, "text_deltas": True}


def _reply(
    services: Services, request: Request, body: OpenAIRequest, prompts: list[GenerateParams], form: AnswerFormat
) -> HeldResponse:
    """Answer ``n`` choices for each prompt, in order."""
    wanted = [params.model_copy(update={"choice": choice}) for params in prompts for choice in range(body.n)]
    name = request_id(request)
    ids = [name] if len(wanted) == 1 else [f"{name}-{index}" for index in range(len(wanted))]
    calls = [_call(services, params, call_id) for params, call_id in zip(wanted, ids, strict=True)]

    async def prepare(stack: AsyncExitStack) -> Response:
        arrivals = await stack.enter_async_context(merged(services.upstream, calls))
        tally = UsageTally(body.n)
        if not body.stream:
            answers = await _gathered(arrivals, len(calls), tally)
            return JSONResponse(to_json(form.whole(answers, tally.total)))
        # The first piece decides between an HTTP error and a stream.
        first = await anext(arrivals)
        return StreamingResponse(_events(services, body, form, first, arrivals, tally), media_type="text/event-stream")

    return HeldResponse(prepare, services.metrics)


def _call(services: Services, params: GenerateParams, call_id: str) -> Call:
    async def body(worker: Worker) -> bytes:
        return json.dumps(await services.bodies.body(worker, params)).encode()

    return Call(model=params.model or "", request_id=call_id, body=body, method=params.method)


async def _gathered(arrivals: Arrivals, count: int, tally: UsageTally) -> list[Piece]:
    answers = [Piece() for _ in range(count)]
    async for index, piece in arrivals:
        answers[index].absorb(piece)
        tally.note(index, piece)
    return answers


async def _events(
    services: Services,
    body: OpenAIRequest,
    form: AnswerFormat,
    first: tuple[int, Piece],
    rest: Arrivals,
    tally: UsageTally,
) -> AsyncIterator[bytes]:
    begun: set[int] = set()
    try:
        async for index, piece in _chain(first, rest):
            tally.note(index, piece)
            if index not in begun or piece.says_something:
                yield event(to_json(form.chunk(index, piece, first=index not in begun)))
            begun.add(index)
        if body.stream_options is not None and body.stream_options.include_usage:
            yield event(to_json(form.usage_chunk(tally.total)))
    except Exception as error:
        services.metrics.broken_answers.inc()
        yield event(_error_content(error))
    yield DONE


async def _chain(first: tuple[int, Piece], rest: Arrivals) -> Arrivals:
    yield first
    async for arrival in rest:
        yield arrival


def _error_content(error: Exception) -> dict[str, object]:
    if not isinstance(error, RequestError):
        log.error("an answer broke off", exc_info=error)
        error = RequestError(ErrorCode.INTERNAL_ERROR, "internal error")
    body = ErrorBody(message=error.message, type=error.error_type, code=int(error.code))
    return ErrorReply(error=body).model_dump()
