"""Runs a FastChat worker without a model: the real registration, heart beat and HTTP face around fixed words."""

import argparse
import json
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastchat.serve import base_model_worker


class WordsWorker(base_model_worker.BaseModelWorker):
    def __init__(self, controller: str, address: str) -> None:
        super().__init__(controller, address, "w", "vicuna", ["vicuna-words"], 2, conv_template="vicuna_v1.1")
        self.context_len = 512
        self.tokenizer = lambda prompt: argparse.Namespace(input_ids=prompt.split())
        self.init_heart_beat()

    def generate_stream_gate(self, params: dict[str, Any]) -> Iterator[bytes]:
        text = ""
        for word in ("FastChat ", "says ", "hello"):
            text += word
            yield json.dumps({"text": text, "error_code": 0, "finish_reason": None}).encode() + b"\0"
        yield json.dumps({"text": text, "error_code": 0, "finish_reason": "stop"}).encode() + b"\0"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--controller")
    parser.add_argument("--port", type=int)
    given = parser.parse_args()
    WordsWorker(given.controller, f"http://127.0.0.1:{given.port}")
    uvicorn.run(base_model_worker.app, host="127.0.0.1", port=given.port)
