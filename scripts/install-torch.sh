#!/bin/sh
# install-torch.sh PYTHON VERSION: torch for this machine, without CUDA packages where there is no GPU.
set -eu
python=$1
version=$2

if "$python" -c 'import torch' 2>/dev/null; then
    exit 0
fi
if [ "$(uname -s)" != Linux ] || { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }; then
    exec "$python" -m pip install --quiet "torch==$version"
fi
"$python" -m pip install --quiet "torch==$version+cpu" 2>/dev/null && exit 0
"$python" -m pip install --quiet uv
exec "$python" -m uv pip install --quiet --python "$python" --torch-backend cpu "torch==$version"
