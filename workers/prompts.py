"""From messages or text to prompt tokens, with BOS exactly once."""

import copy
import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from protocol.errors import ErrorCode, RequestError
from protocol.fleet import ConvTemplate
from protocol.generation import ChatMessage

_SYSTEM, _USER, _ASSISTANT = "\x02system\x02", "\x02user\x02", "\x02assistant\x02"
Render = Callable[[Sequence[ChatMessage]], str]

logger = logging.getLogger(__name__)

ADD_COLON_SINGLE = 1
PLAIN = ConvTemplate(name="plain", sep_style=ADD_COLON_SINGLE, sep="\n", roles=["USER", "ASSISTANT"])
NO_COLON_SINGLE = 4  # FastChat's sep_style whose prompt is prefix + message + suffix, turn after turn


@dataclass(frozen=True)
class Prompt:
    """Rendered text and its tokens."""

    text: str
    token_ids: list[int]


class PromptRenderer:
    """Renders prompts for one model: by its tokenizer's chat template, else by one of FastChat's."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model_name: str, conv_template: str | None = None) -> None:
        """``conv_template`` names one of FastChat's templates and takes precedence over the tokenizer's own.

        Raises:
            ValueError: no such template, or FastChat is needed and not installed.
        """
        self._tokenizer = tokenizer
        self._fastchat = None
        self._plain = False
        if conv_template or not tokenizer.chat_template:
            self._fastchat = _fastchat_template(model_name, conv_template)
            self._plain = self._fastchat is None

    def render(self, messages: Sequence[ChatMessage]) -> Prompt:
        """The prompt of a conversation, up to where the assistant's answer starts.

        Raises:
            RequestError: the template refuses the conversation.
        """
        try:
            text = self._text(messages)
        except Exception as error:  # templates raise whatever they like
            message = f"messages: the model's chat template refuses them: {error}"
            raise RequestError(ErrorCode.VALIDATION_TYPE_ERROR, message) from None
        return self.encode(text)

    def encode(self, text: str) -> Prompt:
        """Tokens of text that may carry its own BOS."""
        bos = self._tokenizer.bos_token
        has_bos = bool(bos) and text.startswith(bos)
        return Prompt(text, list(self._tokenizer.encode(text, add_special_tokens=not has_bos)))

    def conversation(self, name: str) -> ConvTemplate:
        """This model's template in FastChat's form, for clients that build prompts themselves."""
        if self._fastchat is not None and int(self._fastchat.sep_style) <= 7:
            return ConvTemplate.model_validate(_fastchat_fields(self._fastchat))
        return _probed_conversation(self._text, name, self._end_of_turn())

    def _text(self, messages: Sequence[ChatMessage]) -> str:
        if self._fastchat is not None:
            return _render_fastchat(self._fastchat, messages)
        if self._plain:
            return _plain_text(messages)
        turns = [message.model_dump() for message in messages]
        return str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def _end_of_turn(self) -> list[int]:
        eos = self._tokenizer.eos_token_id
        return [] if eos is None else [eos]


def _probed_conversation(render: Render, name: str, stop_token_ids: list[int]) -> ConvTemplate:
    """Express a chat template as prefix + message + suffix, by rendering marked messages.

    Templates that are not of that shape (no system role, other text between turns) get the plain one.
    """
    user, assistant = ChatMessage(role="user", content=_USER), ChatMessage(role="assistant", content=_ASSISTANT)
    try:
        marked = render([ChatMessage(role="system", content=_SYSTEM), user, assistant, user])
        system_prefix, rest = marked.split(_SYSTEM)
        before_user, rest = rest.split(_USER, 1)
        before_assistant, rest = rest.split(_ASSISTANT)
        default = render([user]).split(_USER)[0]
    except Exception:  # templates raise whatever they like; unpacking fails where marks are missing or repeated
        return PLAIN.model_copy(update={"name": name})
    if rest != before_user + _USER + before_assistant:
        return PLAIN.model_copy(update={"name": name})
    separator = _separator(before_user, before_assistant, system_prefix)
    user_prefix, assistant_prefix = before_user[len(separator) :], before_assistant[len(separator) :]
    system_template, system_message = _system_part(default, system_prefix, separator, user_prefix)
    return ConvTemplate(
        name=name,
        system_template=system_template,
        system_message=system_message,
        roles=[user_prefix, assistant_prefix],
        sep_style=NO_COLON_SINGLE,
        sep=separator,
        stop_token_ids=stop_token_ids or None,
    )


def _separator(before_user: str, before_assistant: str, system_prefix: str) -> str:
    """What ends every turn: the start that both share, less the opening mark that begins the system turn, too."""
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(before_user, before_assistant, strict=False))
    shared = "".join(first for first, _ in pairs)
    for size in range(len(shared) - 1, 0, -1):
        if shared.endswith(system_prefix[:size]):
            return shared[:-size]
    return shared


def _system_part(default: str, system_prefix: str, separator: str, user_prefix: str) -> tuple[str, str]:
    """(system_template, system_message) that reproduce what the template puts before a lone user turn."""
    opening = default.removesuffix(user_prefix)
    if system_prefix and opening.startswith(system_prefix) and opening.endswith(separator):
        message = opening[len(system_prefix) : len(opening) - len(separator)]
        return _escaped(system_prefix) + "{system_message}" + _escaped(separator), message
    return "{system_message}", opening


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _plain_text(messages: Sequence[ChatMessage]) -> str:
    names = {"system": "", "user": "USER: ", "assistant": "ASSISTANT: "}
    turns = [names.get(message.role, f"{message.role.upper()}: ") + message.content for message in messages]
    return "\n".join([*turns, "ASSISTANT:"])


def _fastchat_template(model_name: str, template: str | None) -> Any:
    """FastChat's conversation template called ``template``, or its choice for a model of that name."""
    if importlib.util.find_spec("fastchat") is None:
        if template:
            raise ValueError(f"--conv-template {template} needs FastChat: pip install fschat==0.2.36")
        logger.warning("the tokenizer has no chat template and fschat is not installed: using USER:/ASSISTANT:")
        return None
    from fastchat.conversation import conv_templates

    if template:
        if template not in conv_templates:
            raise ValueError(f"FastChat has no conversation template {template!r}")
        return conv_templates[template]
    from fastchat.model.model_adapter import get_conversation_template

    return get_conversation_template(model_name)


def _render_fastchat(template: Any, messages: Sequence[ChatMessage]) -> str:
    conversation = copy.deepcopy(template)
    conversation.messages = []
    for message in messages:
        if message.role == "system":
            conversation.set_system_message(message.content)
        else:
            conversation.append_message(conversation.roles[message.role == "assistant"], message.content)
    conversation.append_message(conversation.roles[1], None)
    return str(conversation.get_prompt())


def _fastchat_fields(template: Any) -> dict[str, Any]:
    fields = {name: getattr(template, name) for name in ConvTemplate.model_fields if name != "messages"}
    return {**fields, "sep_style": int(template.sep_style), "roles": list(template.roles), "messages": []}
