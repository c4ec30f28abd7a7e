"""Compiling and loading the CPU kernels, once a machine and version."""

import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

from workers.model.checkpoint import cache_folder

logger = logging.getLogger(__name__)

SOURCES = [Path(__file__).with_name(name) for name in ("cpu.cpp", "amx.h", "attention.h", "product.h")]
FLAGS = ["-O3", "-march=native", "-std=gnu++20", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing"]
FLAGS += ["-shared", "-fPIC", "-Wno-unknown-pragmas"]


@lru_cache(maxsize=1)
def load_kernels() -> str | None:
    """Load the kernels, compiling them if this machine has none yet; the key of this build, None without a compiler.

    A compiler is ``$CXX``, ``g++``, ``clang++`` or ``c++``. A failure is logged in one line and never raised.
    """
    names = [os.environ.get("CXX", "g++"), "g++", "clang++", "c++"]
    compiler = next((found for name in names if (found := shutil.which(name))), None)
    if compiler is None:
        logger.warning("no C++ compiler: serving on torch's own operations; install g++ for a faster CPU path")
        return None
    try:
        key = _build_key(compiler)
        library = cache_folder() / "kernels" / f"{key}.so"
        if not library.is_file():
            _compile(compiler, library)
        torch.ops.load_library(str(library))
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stderr", "") or str(error)
        logger.warning("CPU kernels do not build, serving on torch's own operations: %s", output.strip().split("\n")[0])
        return None
    return key


def _build_key(compiler: str) -> str:
    """Of everything that the library depends on: the machine's instructions, the compiler, torch and the sources."""
    macros = subprocess.run(
        [compiler, "-march=native", "-dM", "-E", "-x", "c++", "/dev/null"], capture_output=True, check=True, text=True
    ).stdout
    parts = [macros, torch.__version__, *FLAGS, *(source.read_text() for source in SOURCES)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, library: Path) -> None:
    logger.info("compiling the CPU kernels, once")
    root = Path(torch.__file__).parent
    links = [f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        command = [compiler, *FLAGS, f"-I{root / 'include'}", str(SOURCES[0]), "-o", str(made), *links]
        subprocess.run(command, capture_output=True, check=True, text=True)
        made.replace(library)
