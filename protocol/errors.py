"""FastChat's error codes, and the one exception that carries them to a client."""

from enum import IntEnum


class ErrorCode(IntEnum):
    """Values and names as in FastChat's ``constants.ErrorCode``."""

    VALIDATION_TYPE_ERROR = 40001
    INVALID_AUTH_KEY = 40101
    INCORRECT_AUTH_KEY = 40102
    NO_PERMISSION = 40103
    INVALID_MODEL = 40301
    PARAM_OUT_OF_RANGE = 40302
    CONTEXT_OVERFLOW = 40303
    RATE_LIMIT = 42901
    QUOTA_EXCEEDED = 42902
    ENGINE_OVERLOADED = 42903
    INTERNAL_ERROR = 50001
    CUDA_OUT_OF_MEMORY = 50002
    GRADIO_REQUEST_ERROR = 50003
    GRADIO_STREAM_UNKNOWN_ERROR = 50004
    CONTROLLER_NO_WORKER = 50005
    CONTROLLER_WORKER_TIMEOUT = 50006


_HTTP_STATUS = {
    ErrorCode.INVALID_MODEL: 404,
    ErrorCode.CONTROLLER_NO_WORKER: 503,
    ErrorCode.CONTROLLER_WORKER_TIMEOUT: 504,
    ErrorCode.ENGINE_OVERLOADED: 429,
}

_ERROR_TYPE = {
    400: "invalid_request_error",
    404: "not_found_error",
    429: "overloaded_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class RequestError(Exception):
    """A request that cannot be served: a code and one readable line for the client."""

    def __init__(self, code: ErrorCode | int, message: str) -> None:
        super().__init__(message)
        self.code = _known_code(code)
        self.message = message

    @property
    def http_status(self) -> int:
        """The status of an OpenAI-style answer: 4xx for the client's faults, 5xx for ours."""
        if self.code in _HTTP_STATUS:
            return _HTTP_STATUS[self.code]
        first_digits = int(self.code) // 100
        return {401: 401, 429: 429}.get(first_digits, 400 if self.code < 50000 else 500)

    @property
    def error_type(self) -> str:
        """The ``type`` field of an OpenAI error body."""
        return _ERROR_TYPE.get(self.http_status, "server_error")


def _known_code(code: int) -> ErrorCode:
    try:
        return ErrorCode(code)
    except ValueError:
        return ErrorCode.INTERNAL_ERROR
