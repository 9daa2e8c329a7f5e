#!/usr/bin/env bash
# Runs every listed setting of the peers, one after another, and evaluates each; existing results are kept.
# Usage: benchmarks/peers/run.sh llmcompressor|gptqmodel|autoround     Weights go to $PEERS_OUT (build/peers).
set -euo pipefail
cd "$(dirname "$0")/../.."
out="${PEERS_OUT:-build/peers}"
threads="${PEERS_THREADS:-2}"
base="${QUANTKIT_VENV:-.venv}/bin/python"
mkdir -p "$out"

one() { # one <peer> <environment> <scheme> <tag> <arguments...>
    local peer="$1" scheme="$2" dir="$out/$1-$2-$3"
    shift 3
    [ -e "$dir/run.json" ] || env OMP_NUM_THREADS="$threads" HF_HUB_OFFLINE=1 nice -n 10 \
        ".venvs/$peer/bin/python" "benchmarks/peers/peer_$peer.py" --scheme "$scheme" --out "$dir" "$@" > "$dir.log" 2>&1 ||
        { echo "FAILED $dir: $(tail -n 1 "$dir.log")"; return 0; }
    env OMP_NUM_THREADS="$threads" nice -n 10 "$base" benchmarks/peers/evaluate.py --decoded "$dir" --name "$peer" --scheme "$scheme"
}

llmcompressor() {
    local fine='{"norm": 2.0, "grid": 100, "maxshrink": 0.5, "patience": 50}'
    for scheme in int4 int3 mixed; do
        one llmcompressor "$scheme" d01 --damp 0.01
        one llmcompressor "$scheme" d10 --damp 0.1
        one llmcompressor "$scheme" fine --damp 0.01 --observer-kwargs "$fine"
        one llmcompressor "$scheme" fine10 --damp 0.1 --observer-kwargs "$fine"
    done
    one llmcompressor int4 all --damp 0.01 --all-experts
}

"$1"
