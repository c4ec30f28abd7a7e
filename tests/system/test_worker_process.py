"""The worker as a process: how it refuses to start, how it finds its controller, how it leaves."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from tests.support import processes
from tests.support.families import VOCABULARY
from tests.support.processes import ENVIRONMENT, addresses, free_port
from tests.support.serving import wait_until
from tests.support.tiny import save_tiny
from tests.support.tokenizers import byte_tokenizer


def refusal(*options: str, **environment: str) -> str:
    """The one line with which a worker refuses to start."""
    command = [sys.executable, "-m", "workers", "--no-register", "--port", "0", *options]
    ended = subprocess.run(command, capture_output=True, text=True, env={**ENVIRONMENT, **environment}, timeout=120)
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, ended.stderr
    assert ended.stderr.rstrip().endswith(lines[0])
    return lines[0]


def broken(folder: Path, kind: str) -> Path:
    """A model path that cannot be served."""
    if kind == "garbage.gguf":
        (folder / kind).write_bytes(b"GGUF" + bytes(range(256)) * 8)
    elif kind == "text.gguf":
        (folder / kind).write_bytes(b"no such format")
    elif kind == "empty":
        (folder / kind).mkdir()
    elif kind == "missing weight":
        save_tiny(folder / kind)
        weights = load_file(folder / kind / "model.safetensors")
        del weights["model.layers.2.mlp.up_proj.weight"]
        save_file(weights, folder / kind / "model.safetensors", {"format": "pt"})
    elif kind == "mamba":
        config = tf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
        tf.MambaForCausalLM(config).save_pretrained(folder / kind)
        byte_tokenizer().save_pretrained(folder / kind)
    elif kind == "convolutions":
        hybrid(folder / kind)
    return folder / kind


def hybrid(folder: Path) -> None:
    """LFM2: beside attention it has convolutions along the rows, which know nothing of trees and chunks."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "full_attn_idxs": [1]}
    config = tf.Lfm2Config(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=2, **heads)
    torch.manual_seed(0)
    model = tf.Lfm2ForCausalLM(config)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


# What cannot be served, and what the refusal says about it.
MODELS = {
    "nowhere": "no such model path",
    "garbage.gguf": "cannot read the GGUF file",
    "text.gguf": "is no GGUF file",
    "empty": "no config.json",
    "missing weight": "model.layers.2.mlp.up_proj.weight",
    "mamba": "MambaForCausalLM cannot be served",
    "convolutions": "Lfm2ForCausalLM is not supported: over token trees its logits differ",
}
OPTIONS = {
    "--model-path smollm9": "smollm2-135m",
    "--method telepathy": "unknown method 'telepathy'",
    "--lookahead-level 2": "draft level: Input should be greater than or equal to 3",
    "--LEVEL 2": "draft level",
    "--lookahead-window 0": "draft window",
    "--lookahead-guesses 0": "draft guesses",
    "--lookahead-window 100000": "draft.window: 100000 does not fit into the context",
    "--draft-nodes 0": "draft nodes",
    "--acceptance perhaps": "draft acceptance: Input should be 'exact' or 'typical'",
    "--posterior-alpha 2": "draft posterior_alpha",
    "--controller-address http://here:abc": "Invalid port",
    "--device abacus": "abacus",
    "--dtype float7": "float7",
    "--conv-template nonesuch": "nonesuch",
}


@pytest.fixture(scope="module")
def refusals(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[str]]]:
    """All of them, two processes at a time: each spends seconds on its imports."""
    folder = tmp_path_factory.mktemp("broken")
    with ThreadPoolExecutor(2) as pool:
        models = {kind: pool.submit(refusal, "--model-path", str(broken(folder, kind))) for kind in MODELS}
        usual = ["--model-path", str(checkpoint)]  # the last --model-path counts
        yield models | {words: pool.submit(refusal, *usual, *words.split()) for words in OPTIONS}


@pytest.mark.parametrize(("kind", "words"), MODELS.items())
def test_a_model_that_cannot_be_served_is_refused_in_one_line(
    refusals: dict[str, Future[str]], kind: str, words: str
) -> None:
    assert words in refusals[kind].result()


@pytest.mark.parametrize(("options", "words"), OPTIONS.items())
def test_unknown_names_are_refused_in_one_line(refusals: dict[str, Future[str]], options: str, words: str) -> None:
    assert words in refusals[options].result()


def test_a_bad_setting_is_refused_in_one_line(checkpoint: Path) -> None:
    line = refusal("--model-path", str(checkpoint), FASTCHAT_WORKER_HEART_BEAT_INTERVAL="often")
    assert "FASTCHAT_WORKER_HEART_BEAT_INTERVAL" in line


def test_a_port_in_use_is_refused_before_anything_slow(checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        script = "import sys, runpy; sys.modules['torch'] = None; runpy.run_module('workers', run_name='__main__')"
        command = [sys.executable, "-c", script, "--model-path", str(checkpoint), "--port", port]
        ended = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.strip() == f"error: cannot listen on 127.0.0.1:{port}: Address already in use"


def test_a_worker_waits_for_its_controller_and_survives_its_restart(checkpoint: Path, tmp_path: Path) -> None:
    port = free_port()
    url, state = f"http://127.0.0.1:{port}", tmp_path / "state.json"
    options = ["--controller-address", url]
    with processes.worker(checkpoint, None, *options, "--register") as worker:
        assert generated(worker.url)["error_code"] == 0  # it serves although nobody knows it
        for _ in range(2):
            with processes.controller(port, state) as controller:
                wait_until(lambda: worker.url in addresses(url))
                controller.kill()
            state.unlink(missing_ok=True)  # the second controller knows nobody


def generated(url: str) -> dict:
    body = {"prompt": "hi", "max_new_tokens": 4, "temperature": 0}
    return httpx.post(f"{url}/worker_generate", json=body, timeout=60, trust_env=False).json()


def takes_nothing_new(url: str) -> bool:
    """Whether a worker refuses a request, in the answer or at its door."""
    try:
        return generated(url)["error_code"] != 0
    except httpx.TransportError:
        return True


def test_sigterm_leaves_the_controller_and_finishes_what_runs(checkpoint: Path, tmp_path: Path) -> None:
    """The stream still runs when the worker has left the table and refuses what is new; then the process ends well."""
    tokens = 1500
    body = {"prompt": "hi", "max_new_tokens": tokens, "temperature": 0, "logit_bias": {2: -100}, "text_deltas": True}
    with (
        processes.controller(state=tmp_path / "state.json") as controller,
        processes.worker(checkpoint, controller.url) as worker,
        httpx.Client(timeout=60, trust_env=False) as client,
    ):
        with client.stream("POST", f"{worker.url}/worker_generate_stream", json=body) as response:
            chunks = response.iter_raw()
            received = next(chunks)
            worker.process.send_signal(signal.SIGTERM)
            wait_until(lambda: not addresses(controller.url))
            assert takes_nothing_new(worker.url)
            assert worker.process.poll() is None
            received += b"".join(chunks)
        last = json.loads(received.split(b"\0")[-2])
        assert (last["finish_reason"], last["usage"]["completion_tokens"]) == ("length", tokens)
        assert worker.process.wait(60) == 0
