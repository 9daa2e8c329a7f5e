#!/usr/bin/env bash
# llama.cpp's own quantiser: a virtual environment .venvs/llama with llama-cpp-python, built from its sdist
# (a quarter of an hour on two cores; needs a C++ compiler). gguf and numpy are those of quantkit's own environment.
set -euo pipefail
cd "$(dirname "$0")/../.."
base="${QUANTKIT_VENV:-.venv}"
[ -x .venvs/llama/bin/python ] || "$base/bin/python" -m venv .venvs/llama
purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
"$base/bin/python" -c "$purelib" > "$(.venvs/llama/bin/python -c "$purelib")/_base.pth"
CMAKE_BUILD_PARALLEL_LEVEL="${JOBS:-2}" .venvs/llama/bin/python -m pip install --no-cache-dir llama-cpp-python==0.3.36
