"""llm-compressor's GPTQ on tiny-deepseek-v3: model and calibration windows in, decoded float32 weights out.

    .venvs/llmcompressor/bin/python benchmarks/peers/peer_llmcompressor.py --scheme int4 --damp 0.01 --out DIR

Its own best choices: the imatrix_mse observer, static activation order, sequential pipeline with propagated error.
Experts are calibrated on their own tokens only (moe_calibrate_all_experts=False; the default True was not better).
Model, and so the scales, in float32 where a release would have bfloat16: a little in the peer's favour.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, fake_quantize
from datasets import Dataset
from decoded import Stopwatch, write_decoded
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from protocol import (
    CALIBRATION_WINDOWS,
    GROUP_SIZE,
    NARROW_GROUP,
    bits_of,
    calibration_windows,
    group_size,
    is_projection,
    model_dir,
    narrow,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

IGNORED = ["lm_head", r"re:.*mlp\.gate$", r"re:.*indexer\.(wk|weights_proj)$"]
ROUTED = r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"
NOT_ROUTED = r"re:.*(self_attn\.\w+|layers\.0\.mlp\.\w+_proj|shared_experts\.\w+_proj)$"


def group_of(
    bits: int, targets: list[str], observer: str, observer_kwargs: dict[str, Any], group: int = GROUP_SIZE
) -> QuantizationScheme:
    weights = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=True,
        strategy="group",
        group_size=group,
        observer=observer,
        observer_kwargs=observer_kwargs,
    )
    return QuantizationScheme(targets=targets, weights=weights)


def config_groups(scheme: str, observer: str, observer_kwargs: dict[str, Any]) -> dict[str, QuantizationScheme]:
    if scheme == "mixed":
        return {
            "routed": group_of(4, [ROUTED], observer, observer_kwargs),
            "rest": group_of(8, [NOT_ROUTED], observer, observer_kwargs),
        }
    bits, odd = int(scheme.removeprefix("int")), narrow()
    groups = {"narrow": group_of(bits, odd, observer, observer_kwargs, NARROW_GROUP)} if odd else {}
    return {**groups, "all": group_of(bits, ["Linear"], observer, observer_kwargs)}  # a name goes before a class


def decode(model: torch.nn.Module, scheme: str) -> dict[str, torch.Tensor]:
    """Each projection as the kernel would see it; refuses a projection that was left out or has other bits."""
    weights: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if not is_projection(f"{name}.weight"):
            continue
        args = module.quantization_scheme.weights
        assert args.num_bits == bits_of(f"{name}.weight", scheme), f"{name} has {args.num_bits} bits"
        assert args.group_size == group_size(module.weight.shape[1]), f"{name} has groups of {args.group_size}"
        decoded = fake_quantize(module.weight, module.weight_scale, module.weight_zero_point, args)
        moved = (decoded - module.weight).abs().max().item()
        assert moved <= 1e-4 * module.weight.abs().max().item(), f"{name} was not on its grid: moved by {moved}"
        weights[f"{name}.weight"] = decoded
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", choices=["int3", "int4", "mixed"], required=True)
    parser.add_argument("--damp", type=float, default=0.01)
    parser.add_argument("--observer", default="imatrix_mse")
    parser.add_argument("--observer-kwargs", type=json.loads, default={})
    parser.add_argument("--all-experts", action="store_true", help="every token to every expert, the package's default")
    parser.add_argument("--windows", type=int, default=CALIBRATION_WINDOWS)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    # Stacked experts -> one Linear each. load_quantizable_moe() does it while loading, but needs torchvision to import.
    model = linearize_moe(AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32))
    rows = calibration_windows(args.windows)
    dataset = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
    modifier = GPTQModifier(
        config_groups=config_groups(args.scheme, args.observer, args.observer_kwargs),
        ignore=IGNORED,
        dampening_frac=args.damp,
        actorder="static",
        batched_quantization=72,
    )
    watch = Stopwatch()
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(model_dir()),
        dataset=dataset,
        recipe=[modifier],
        pipeline="sequential",
        batch_size=16,
        num_calibration_samples=args.windows,
        shuffle_calibration_samples=False,
        max_seq_length=rows.shape[1],
        moe_calibrate_all_experts=args.all_experts,
    )
    seconds = watch.read()
    observer = args.observer + (f" {json.dumps(args.observer_kwargs)}" if args.observer_kwargs else "")
    tokens = "all tokens to all experts" if args.all_experts else "routed tokens only"
    settings = f"GPTQ, {observer}, act order static, damp {args.damp:g}, {tokens}"
    write_decoded(args.out, decode(model, args.scheme), settings, seconds, "llmcompressor")


if __name__ == "__main__":
    main()
