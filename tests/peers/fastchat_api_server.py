"""Runs FastChat's OpenAI server. Its streaming calls a pydantic 1 method, which is put back first."""

import json
from typing import Any

import uvicorn
from fastchat.protocol import openai_api_protocol as protocol


def _json(
    self: Any, *, exclude_unset: bool = False, exclude_none: bool = False, ensure_ascii: bool = True, **_: Any
) -> str:
    content = self.model_dump(mode="json", exclude_unset=exclude_unset, exclude_none=exclude_none)
    return json.dumps(content, ensure_ascii=ensure_ascii)


protocol.ChatCompletionStreamResponse.json = _json
protocol.CompletionStreamResponse.json = _json

import fastchat.serve.openai_api_server as server  # noqa: E402  (after the repair)

arguments = server.create_openai_api_server()
uvicorn.run(server.app, host=arguments.host, port=arguments.port)
