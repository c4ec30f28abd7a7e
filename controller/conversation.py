"""Rendering a prompt from a FastChat conversation template, for workers that take no messages."""

from collections.abc import Sequence

from protocol.errors import ErrorCode, RequestError
from protocol.fleet import ConvTemplate
from protocol.generation import ChatMessage

Turn = tuple[str, str | None]  # who speaks, and what; None (or nothing) leaves the turn open for the model

ADD_COLON_SINGLE, ADD_COLON_TWO, ADD_COLON_SPACE_SINGLE, NO_COLON_SINGLE, NO_COLON_TWO, ADD_NEW_LINE_SINGLE, LLAMA2 = (
    range(1, 8)
)

# What stands between a role and its text, and after a role whose turn is open.
_AFTER_ROLE = {
    ADD_COLON_SINGLE: (": ", ":"),
    ADD_COLON_TWO: (": ", ":"),
    ADD_COLON_SPACE_SINGLE: (": ", ": "),
    NO_COLON_SINGLE: ("", ""),
    NO_COLON_TWO: ("", ""),
    ADD_NEW_LINE_SINGLE: ("\n", "\n"),
}
_TWO_SEPARATORS = (ADD_COLON_TWO, NO_COLON_TWO)


def render(template: ConvTemplate, messages: Sequence[ChatMessage]) -> str:
    """The prompt for ``messages``, open for the assistant's next turn; the template's own examples come first.

    Raises:
        RequestError: a role other than system, user and assistant, or a separator style on which FastChat's versions
            disagree.
    """
    if template.sep_style != LLAMA2 and template.sep_style not in _AFTER_ROLE:
        raise RequestError(
            ErrorCode.INTERNAL_ERROR,
            f"the worker's template {template.name!r} has separator style {template.sep_style}; only 1 to 7 are known",
        )
    system_message = template.system_message
    turns: list[Turn] = [(turn[0] or "", turn[1]) for turn in template.messages if len(turn) == 2]
    speakers = {"user": template.roles[0], "assistant": template.roles[1]}
    for message in messages:
        if message.role == "system":
            system_message = message.content
        elif message.role in speakers:
            turns.append((speakers[message.role], message.content))
        else:
            raise RequestError(ErrorCode.PARAM_OUT_OF_RANGE, f"messages: unknown role {message.role!r}")
    turns.append((speakers["assistant"], None))
    system = template.system_template.replace("{system_message}", system_message)
    if template.sep_style == LLAMA2:
        return _llama2(template, system if system_message else "[INST] ", turns)
    return _plain(template, system, turns)


def _plain(template: ConvTemplate, system: str, turns: list[Turn]) -> str:
    style = template.sep_style
    separators = [template.sep, (template.sep2 or "") if style in _TWO_SEPARATORS else template.sep]
    before_text, when_open = _AFTER_ROLE[style]
    colon = style in (ADD_COLON_SINGLE, ADD_COLON_TWO, ADD_COLON_SPACE_SINGLE)
    new_line = style == ADD_NEW_LINE_SINGLE and system != ""
    prompt = system + (template.sep if colon or new_line else "")
    for index, (role, text) in enumerate(turns):
        prompt += role + before_text + text + separators[index % 2] if text else role + when_open
    return prompt


def _llama2(template: ConvTemplate, system: str, turns: list[Turn]) -> str:
    separators = [template.sep, template.sep2 or ""]
    prompt = system
    for index, (_, text) in enumerate(turns):
        tag = template.roles[index % 2]
        if not text:
            prompt += tag
        elif index == 0:
            prompt += text + " "  # the first tag stands in the system template
        else:
            prompt += tag + " " + text + separators[index % 2]
    return prompt
