#!/usr/bin/env bash
# One virtual environment per peer under .venvs/, so that no peer's pins touch another's (or quantkit's).
# Torch and the other heavy packages are not installed again: a .pth file shows each environment the packages of
# quantkit's own .venv (--system-site-packages would show those of the system's interpreter instead).
# Usage: benchmarks/peers/setup.sh [llmcompressor] [gptqmodel] [autoround]      (no argument: all three)
set -euo pipefail
cd "$(dirname "$0")/../.."
base="${QUANTKIT_VENV:-.venv}"
base_site="$("$base/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

venv() {
    [ -x ".venvs/$1/bin/python" ] || "$base/bin/python" -m venv ".venvs/$1"
    local site
    site="$(".venvs/$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    echo "$base_site" > "$site/_base.pth"
    pip=".venvs/$1/bin/python -m pip install -q --disable-pip-version-check"
}

llmcompressor() {
    venv llmcompressor
    # Its pins bring their own transformers 5.17.0, compressed-tensors 0.19.0 and huggingface_hub 1.33.
    $pip llmcompressor==0.14.0.1 transformers==5.17.0 compressed-tensors==0.19.0
}

gptqmodel() {
    venv gptqmodel
    # The sdist wants torch >= 2.14.1 (a CUDA build of 15 packages); on a CPU it runs with 2.13, hence --no-deps.
    $pip -U "setuptools>=80" wheel ninja
    $pip --no-build-isolation --no-deps gptqmodel==7.7.0 Defuser Device-SMI LogBar PyPcre TokeNicer torchao datasets \
        dill multiprocess pandas pyarrow python-dateutil xxhash threadpoolctl protobuf pillow six tzdata \
        requests urllib3 certifi charset_normalizer
}

autoround() {
    venv autoround
    $pip auto-round==0.16.1
}

for peer in "${@:-llmcompressor gptqmodel autoround}"; do
    for name in $peer; do "$name"; done
done
