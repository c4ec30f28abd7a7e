"""``polydecode curve``: the latency curve of a model on this machine."""

import sys

from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from workers.engine import Engine
from workers.model.checkpoint import ModelLoadError
from workers.warm_up import WarmUp


def run(
    model: str, device: str | None, dtype: str | None, quantization: str | None, *, compile_decoder: bool, fresh: bool
) -> int:
    """Print the curve that a worker with these options measures; returns the exit status."""
    disable_progress_bar()
    set_verbosity_error()
    try:
        engine = Engine.load(model, device=device, dtype=dtype, quantization=quantization)
    except ModelLoadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    with engine:
        print(engine.description())
        WarmUp(engine, model, quantization, compile_decoder=compile_decoder, measure=False).wait()
        print(engine.measure(fresh=fresh))
    return 0
