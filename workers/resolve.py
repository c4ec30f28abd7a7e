"""From a client's parameters to a checked request in tokens; every refusal is one readable line."""

import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from protocol.errors import ErrorCode, RequestError
from protocol.generation import DraftSettings, GenerateParams
from protocol.reading_order import Whitespace
from workers.decoding.registry import canonical, forks
from workers.forking import MAX_CHILDREN, MAX_DEPTH, ControlTokens, Forking
from workers.model.sampling import Sampling
from workers.prompts import Prompt, PromptRenderer
from workers.request import DEFAULT_MAX_THREADS, GenerationRequest

DEFAULT_NEW_TOKENS = 256  # FastChat's
MAX_CHARACTERS_PER_TOKEN = 64  # more than any text averages


@dataclass(frozen=True)
class Limits:
    """What the model can take.

    Attributes:
        trees: method → names that ``draft.tree`` may have with it.
        control: [Fork] and [Child] of a model that was trained to fork.
        whitespace: what it expects between the texts of threads.
    """

    context_length: int
    vocabulary: int
    stop_token_ids: frozenset[int]
    methods: tuple[str, ...]
    draft: DraftSettings = field(default_factory=DraftSettings)
    trees: Mapping[str, Collection[str]] = field(default_factory=dict)
    control: ControlTokens | None = None
    whitespace: Whitespace = "plain"


def resolve(
    params: GenerateParams,
    *,
    renderer: PromptRenderer,
    limits: Limits,
    request_id: str,
    defaults: Mapping[str, str],
) -> GenerationRequest:
    """Render, tokenise and check a request. ``defaults`` maps served model names to their methods.

    Raises:
        RequestError: with FastChat's code for what is wrong.
    """
    if params.model is not None and params.model not in defaults:
        served = ", ".join(defaults)
        raise RequestError(ErrorCode.INVALID_MODEL, f"model {params.model!r} is not served here; served: {served}")
    _check_size(params, limits.context_length)
    prompt = renderer.render(params.messages) if params.messages is not None else renderer.encode(params.prompt or "")
    if not prompt.token_ids:
        raise RequestError(ErrorCode.PARAM_OUT_OF_RANGE, "prompt: must not be empty")
    _check_tokens("logit_bias", params.logit_bias, limits.vocabulary)
    _check_tokens("stop_token_ids", params.stop_token_ids, limits.vocabulary)
    method = _method(params, limits.methods, defaults)
    return GenerationRequest(
        request_id=request_id,
        prompt=prompt.token_ids,
        sampling=_sampling(params),
        max_new_tokens=_new_tokens(params, prompt, limits.context_length),
        method=method,
        stop_token_ids=limits.stop_token_ids | frozenset(params.stop_token_ids),
        stop_strings=tuple(params.stop),
        echo=prompt.text if params.echo else "",
        logprobs=params.logprobs,
        trace=params.trace,
        draft=_draft(params, limits, method),
        max_threads=params.max_threads or DEFAULT_MAX_THREADS,
        max_total_tokens=params.max_total_tokens,
        forking=_forking(params, limits.control, method),
        whitespace=params.whitespace or limits.whitespace,
    )


def _check_size(params: GenerateParams, context_length: int) -> None:
    """Refuse texts that cannot fit before they are tokenised, which would hold up other requests."""
    texts = [params.prompt or "", *(message.content for message in params.messages or [])]
    size = sum(map(len, texts))
    if size > MAX_CHARACTERS_PER_TOKEN * context_length:
        message = f"the prompt's {size} characters exceed the context of {context_length} tokens"
        raise RequestError(ErrorCode.CONTEXT_OVERFLOW, message)


def _sampling(params: GenerateParams) -> Sampling:
    return Sampling(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=max(0, params.top_k),
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        seed=secrets.randbits(63) if params.seed is None else params.seed,
        choice=params.choice,
    )


def _new_tokens(params: GenerateParams, prompt: Prompt, context_length: int) -> int:
    room = context_length - len(prompt.token_ids)
    if params.max_length is not None:
        room = min(room, params.max_length - len(prompt.token_ids))
    if room < 1:
        limit = min(context_length, params.max_length or context_length)
        message = f"the prompt has {len(prompt.token_ids)} tokens, which leaves no room in a length of {limit}"
        raise RequestError(ErrorCode.CONTEXT_OVERFLOW, message)
    wanted = params.max_new_tokens
    if wanted is None:
        return room if params.max_length is not None else min(room, DEFAULT_NEW_TOKENS)
    if wanted > room and params.max_length is None:
        message = (
            f"the prompt's {len(prompt.token_ids)} tokens and {wanted} new ones exceed the context of {context_length}"
        )
        raise RequestError(ErrorCode.CONTEXT_OVERFLOW, message)
    return min(wanted, room)


def _method(params: GenerateParams, methods: tuple[str, ...], defaults: Mapping[str, str]) -> str:
    method = canonical(params.method or defaults.get(params.model or "", methods[0]))
    if method not in methods:
        served = ", ".join(methods)
        raise RequestError(ErrorCode.PARAM_OUT_OF_RANGE, f"method {method!r} is not served here; served: {served}")
    return method


def _forking(params: GenerateParams, control: ControlTokens | None, method: str) -> Forking | None:
    """Whatever the method is, a model's control tokens are never text: where threads may not fork, both are banned."""
    if control is None:
        return None
    return Forking(
        control,
        max_depth=(params.max_depth or MAX_DEPTH) if forks(method) else 1,
        max_children=MAX_CHILDREN if params.max_children is None else params.max_children,
        max_live=params.max_live_threads,
    )


def _draft(params: GenerateParams, limits: Limits, method: str) -> DraftSettings:
    trees = limits.trees.get(method, ())
    default = limits.draft if limits.draft.tree in trees else limits.draft.model_copy(update={"tree": None})
    draft = params.draft.over(default)
    check_draft(draft, limits.context_length, trees)
    return draft


def check_draft(draft: DraftSettings, context_length: int, trees: Collection[str]) -> None:
    """Refuse a lookahead window that no context could hold, and trees that are not known. Raises RequestError."""
    if draft.tree and draft.tree not in trees:
        known = ", ".join(trees) or "this method has none"
        raise RequestError(ErrorCode.PARAM_OUT_OF_RANGE, f"draft.tree: unknown tree {draft.tree!r}; known: {known}")
    if draft.window and draft.window + (draft.level or 3) > context_length:
        message = f"draft.window: {draft.window} does not fit into the context of {context_length} tokens"
        raise RequestError(ErrorCode.PARAM_OUT_OF_RANGE, message)


def _check_tokens(name: str, tokens: Iterable[int], vocabulary: int) -> None:
    for token in tokens:
        if not 0 <= token < vocabulary:
            message = f"{name}: {token} is no token id of this model (0 to {vocabulary - 1})"
            raise RequestError(ErrorCode.PARAM_OUT_OF_RANGE, message)
