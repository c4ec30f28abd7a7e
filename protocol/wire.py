"""Reading JSON bodies: a typed object, or a RequestError whose message is one readable line."""

import json
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from protocol.errors import ErrorCode, RequestError


class Wire(BaseModel):
    """Base of every message. Unknown keys are ignored, as FastChat does in both directions."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


Message = TypeVar("Message", bound=Wire)

_RANGE_ERRORS = ("greater_than", "less_than", "finite_number", "too_long", "too_short", "value_error")


def parse_body(kind: type[Message], body: bytes) -> Message:
    """Parse a JSON body into ``kind``; an empty body counts as ``{}``.

    Raises:
        RequestError: VALIDATION_TYPE_ERROR for malformed JSON or wrong types, PARAM_OUT_OF_RANGE for bad values.
    """
    try:
        content = json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError) as error:
        raise RequestError(ErrorCode.VALIDATION_TYPE_ERROR, f"the body is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise RequestError(ErrorCode.VALIDATION_TYPE_ERROR, "the body must be a JSON object")
    if b"\\ud" in body.lower() and _has_lone_surrogate(content):
        raise RequestError(ErrorCode.VALIDATION_TYPE_ERROR, "the body's text is not valid Unicode: a lone surrogate")
    return parse_object(kind, content)


def _has_lone_surrogate(content: object) -> bool:
    """Half a character, which JSON can escape but no encoding can carry."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def parse_object(kind: type[Message], content: object) -> Message:
    """Validate an already decoded JSON value; errors as in :func:`parse_body`."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise _readable(error) from None


def _readable(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "body"
    out_of_range = first["type"].startswith(_RANGE_ERRORS)
    code = ErrorCode.PARAM_OUT_OF_RANGE if out_of_range else ErrorCode.VALIDATION_TYPE_ERROR
    message = first["msg"].removeprefix("Value error, ")
    return RequestError(code, f"{where}: {message[:1].lower()}{message[1:]}")
