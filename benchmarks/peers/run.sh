#!/usr/bin/env bash
# Runs the listed settings of the peers one after another, and evaluates each; weights that are already there are kept.
# Usage: benchmarks/peers/run.sh [PATTERN]     PATTERN picks lines of the list, e.g. "^llmcompressor int4"
# Weights and logs go to $PEERS_OUT (build/peers), $PEERS_THREADS (1) threads.
set -euo pipefail
cd "$(dirname "$0")/../.."
out="${PEERS_OUT:-build/peers}"
threads="${PEERS_THREADS:-1}"
base="${QUANTKIT_VENV:-.venv}/bin/python"
mkdir -p "$out/cwd" # some peers write logs/ where they are started
root="$PWD"
out="$(cd "$out" && pwd)"

# peer, scheme, tag of the settings, arguments; the order is the order of interest
list='
llmcompressor int4 d01 --damp 0.01
llmcompressor int3 d01 --damp 0.01
llmcompressor mixed d01 --damp 0.01
gptqmodel int4 mse --mse 2.4
llmcompressor int4 fine --damp 0.01 --observer-kwargs {"norm":2.0,"grid":100,"maxshrink":0.5,"patience":50}
llmcompressor int4 d10 --damp 0.1
autoround int4 i200 --iters 200
gptqmodel int3 mse --mse 2.4
llmcompressor int3 d10 --damp 0.1
gptqmodel mixed mse --mse 2.4
gptqmodel int4 foem --mse 2.4 --foem 0.2
autoround int3 i100 --iters 100
autoround mixed i100 --iters 100
gptqmodel int3 foem --mse 2.4 --foem 0.2
gptqmodel int4 default
gptqmodel int4 static --mse 2.4 --desc-act --static-groups
llmcompressor int3 fine --damp 0.01 --observer-kwargs {"norm":2.0,"grid":100,"maxshrink":0.5,"patience":50}
llmcompressor mixed d10 --damp 0.1
gptqmodel mixed foem --mse 2.4 --foem 0.2
llmcompressor int4 all --damp 0.01 --all-experts
'

one() { # one <peer> <scheme> <tag> <arguments...>
    local peer="$1" scheme="$2" dir="$out/$1-$2-$3"
    shift 3
    if [ ! -e "$dir/run.json" ]; then
        env -C "$out/cwd" OMP_NUM_THREADS="$threads" HF_HUB_OFFLINE=1 nice -n 10 "$root/.venvs/$peer/bin/python" \
            "$root/benchmarks/peers/peer_$peer.py" --scheme "$scheme" --out "$dir" "$@" > "$dir.log" 2>&1 < /dev/null ||
            { echo "FAILED $dir: $(tail -n 1 "$dir.log")"; return 0; }
    fi
    env OMP_NUM_THREADS="$threads" nice -n 10 "$base" benchmarks/peers/evaluate.py \
        --decoded "$dir" --name "$peer" --scheme "$scheme" < /dev/null
}

set -f # the arguments hold braces and quotes, no patterns
grep -E "${1:-.}" <<< "$list" | grep . | while read -r line; do
    # shellcheck disable=SC2086
    one $line
done
