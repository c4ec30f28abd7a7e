"""int8 weights: small, close to the original, and the same answers from the kernels as from widened weights."""

from pathlib import Path

import pytest
import torch

from tests.support.families import tiny_model
from tests.support.tiny import save_tiny
from tests.support.tokenizers import byte_tokenizer
from workers.engine import Engine
from workers.model.checkpoint import ModelLoadError
from workers.model.quantization import Int8Linear, quantize_int8


def test_a_layer_is_close_to_its_original() -> None:
    torch.manual_seed(0)
    original = torch.nn.Linear(40, 30)
    original.weight.data[3] = 0
    x = torch.randn(5, 40)
    layer = Int8Linear(original.weight, original.bias)
    assert layer.weight.dtype == torch.int8
    assert (layer(x) - original(x)).abs().max() < 0.02


def test_quantising_reports_what_it_changes() -> None:
    model = tiny_model("llama")
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    report = quantize_int8(model, byte_tokenizer())
    assert report.kind == "int8"
    assert report.tokens == 512
    assert report.agreement > 0.9
    assert report.perplexity == pytest.approx(report.reference_perplexity, rel=0.1)
    stored = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    assert sum(stored.values()) < parameters / 2


def test_an_engine_serves_it_and_says_so(tmp_path: Path) -> None:
    with Engine.load(str(save_tiny(tmp_path)), quantization="int8", kv_tokens=512) as engine:
        events = list(engine.generate("hello", temperature=0, max_new_tokens=8))
    assert events[-1].completion_tokens >= 1
    header = events[0].header
    assert header is not None
    assert header.quantization is not None
    assert header.quantization["kind"] == "int8"


def test_an_unknown_quantization_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="unknown quantization 'int3'; known: int8"):
        Engine.load(str(tmp_path), quantization="int3")
