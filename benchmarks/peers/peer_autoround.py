"""auto-round (signed gradient descent on the rounding) on tiny-deepseek-v3: decoded float32 weights out.

    .venvs/autoround/bin/python benchmarks/peers/peer_autoround.py --scheme int4 --iters 200 --out DIR

Its defaults: 200 iterations a layer of 8 sequences each, tuned clipping, inputs from the quantised predecessors.
The weights are read from its "fake" export, which holds the values on the quantised grid.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from auto_round import AutoRound
from decoded import Stopwatch, write_decoded
from protocol import (
    CALIBRATION_WINDOWS,
    GROUP_SIZE,
    calibration_windows,
    is_projection,
    is_routed,
    load_weights,
    model_dir,
)
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", choices=["int3", "int4", "mixed"], required=True)
    parser.add_argument(
        "--iters", type=int, default=200, help="steps a layer; 0 is its optimised rounding without tuning"
    )
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--alg-ext", action="store_true", help="its experimental extension of the algorithm")
    parser.add_argument("--windows", type=int, default=CALIBRATION_WINDOWS)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32)
    rows = calibration_windows(args.windows)
    bits = 4 if args.scheme == "mixed" else int(args.scheme.removeprefix("int"))
    # Full names: a pattern with an escaped dot matches nothing in it, and says nothing.
    modules = [name for name, _ in model.named_modules() if is_projection(f"{name}.weight") and not is_routed(name)]
    rest = {name: {"bits": 8, "group_size": GROUP_SIZE, "sym": True} for name in modules}
    watch = Stopwatch()
    tuner = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(model_dir()),
        scheme="W4A16",
        bits=bits,
        group_size=GROUP_SIZE,
        sym=True,
        layer_config=rest if args.scheme == "mixed" else None,
        dataset=list(rows.split(args.batch)),
        iters=args.iters,
        seqlen=rows.shape[1],
        nsamples=len(rows),
        batch_size=args.batch,
        device_map="cpu",
        enable_torch_compile=False,
        amp=False,
        enable_alg_ext=args.alg_ext,
    )
    with tempfile.TemporaryDirectory() as folder:
        tuner.quantize_and_save(folder, format="fake")
        seconds = watch.read()
        found = {}
        for path in sorted({file.parent for file in Path(folder).rglob("*.safetensors")}):
            found |= load_weights(path)
    weights = {name: tensor for name, tensor in found.items() if is_projection(name)}
    extension = ", enable_alg_ext" if args.alg_ext else ""
    settings = f"SignRound, {args.iters} iters, {len(rows)} x {rows.shape[1]} tokens, batch {args.batch}{extension}"
    write_decoded(args.out, weights, settings, seconds, "auto-round")


if __name__ == "__main__":
    main()
