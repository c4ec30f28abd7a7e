"""The decoder of narrow steps, compiled ahead of time: one graph for 1 to NARROW_ROWS rows and any context.

Products and attention are the CPU kernels; torch's inductor fuses what lies between them into C++ that runs without
Python. Compiling takes a minute or two and happens in a process of its own, once a model configuration and machine: the
result lies in the cache, without weights. ``python -m workers.model.compiled`` is that process.
"""

import hashlib
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from filelock import FileLock
from torch import nn
from torch._inductor.utils import fresh_cache
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from workers.model.attention import in_narrow_step
from workers.model.checkpoint import cache_folder, load_checkpoint
from workers.model.kernels import NARROW_ROWS
from workers.model.runner import ModelRunner
from workers.model.stock import placeholder_mask

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3  # of the largest value, between the compiled decoder's hidden states and the model's own
_INDUCTOR = {
    "cpp.threads": 1,  # what is left between the kernels is too small to share
    "size_asserts": False,
    "alignment_asserts": False,
    "aot_inductor.package_constants_in_so": False,
}


class _Decoder(nn.Module):
    """The part that is compiled: embeddings in, last hidden states out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.decoder = model.get_decoder()

    def forward(self, embeddings: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """float[1, T, hidden] and int64[1, T] → float[1, T, hidden]."""
        out = self.decoder(
            inputs_embeds=embeddings, position_ids=positions, attention_mask=placeholder_mask(), use_cache=False
        )
        return out.last_hidden_state


def artifact(runner: ModelRunner) -> Path:
    """Where the compiled decoder of this model, machine and version lies or will lie."""
    key = f"{runner.identity}\n{Path(__file__).read_text()}"
    return cache_folder() / "compiled" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt2"


def compile_decoder(runner: ModelRunner, target: Path) -> None:
    """Export, compile and check the decoder; write it to ``target``.

    Raises:
        Exception: whatever torch raises for models that it cannot export.
    """
    decoder = _Decoder(runner.model)
    rows = torch.export.Dim("rows", min=1, max=NARROW_ROWS)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"), tempfile.TemporaryDirectory(dir=target.parent) as scratch, torch.no_grad():
        if target.is_file():
            return
        with runner.trial_step(7) as inputs:
            exported = torch.export.export(decoder, inputs, dynamic_shapes=({1: rows}, {1: rows}))
        made = Path(scratch) / "made.pt2"
        with torch._inductor.config.patch(_INDUCTOR), fresh_cache(dir=scratch):
            torch._inductor.aoti_compile_and_package(exported, package_path=str(made))
        _check(runner, decoder, made)
        made.replace(target)


def install(runner: ModelRunner, path: Path) -> None:
    """Run narrow steps of ``runner`` through the compiled decoder from now on."""
    decoder: Any = runner.model.get_decoder()
    compiled = _load(_Decoder(runner.model), path)
    stock = decoder.forward
    embed = decoder.get_input_embeddings()

    def forward(
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **keywords: Any,
    ) -> Any:
        if not in_narrow_step() or not runner.compiled:
            return stock(input_ids=input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds, **keywords)
        embeddings = embed(input_ids) if inputs_embeds is None else inputs_embeds
        return BaseModelOutputWithPast(last_hidden_state=compiled(embeddings, position_ids))

    decoder.forward = forward
    runner.compiled = True


def _load(decoder: _Decoder, path: Path) -> Any:
    """The compiled graph on the decoder's own weights."""
    compiled = torch._inductor.aoti_load_package(str(path))
    tensors = {**dict(decoder.named_parameters(remove_duplicate=False)), **dict(decoder.named_buffers())}
    constants = {name: tensors[name] for name in compiled.get_constant_fqns()}
    compiled.load_constants(constants, check_full_update=True, user_managed=True)
    return compiled


def _check(runner: ModelRunner, decoder: _Decoder, path: Path) -> None:
    compiled = _load(decoder, path)
    for rows in (1, 5):
        with runner.trial_step(rows) as inputs:
            stock, ours = decoder(*inputs), compiled(*inputs)
        difference, largest = (ours - stock).abs().max().item(), stock.abs().max().item()
        if not difference <= TOLERANCE * largest:
            raise RuntimeError(f"compiled hidden states differ by {difference:.2g} where the largest is {largest:.2g}")


def main(model_path: str, quantization: Annotated[str | None, typer.Argument()] = None) -> None:
    """Compile the decoder of a model that would be served on this CPU, politely, if that was not done before."""
    os.nice(19)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # take the scratch folders along
    logging.basicConfig(level=logging.ERROR)
    checkpoint = load_checkpoint(model_path, dtype=torch.float32, device=torch.device("cpu"), quantization=quantization)
    runner = ModelRunner(checkpoint.model, kv_tokens=NARROW_ROWS)
    compile_decoder(runner, artifact(runner))


if __name__ == "__main__":
    typer.run(main)
