"""llm-compressor's AWQ on tiny-deepseek-v3: model and calibration windows in, a plain float32 checkpoint out.

    .venvs/llmcompressor/bin/python benchmarks/peers/peer_llmcompressor_awq.py --bits 4 --windows 128 --out DIR

Its own mappings for DeepseekV3ForCausalLM join the norms of all layers in one set, because the first layer has no
router; here they are the same mappings with that layer apart. What AWQ folds (norms, the router, rows of up) is in the
result, so DIR is a checkpoint of its own: config.json, tokenizer, all weights. `benchmarks/awq_tiny.py --peer DIR`
evaluates it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, fake_quantize
from datasets import Dataset
from decoded import Stopwatch, write_decoded
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from protocol import calibration_windows, is_projection, load_weights, model_dir
from transformers import AutoModelForCausalLM, AutoTokenizer

IGNORED = ["lm_head", r"re:.*mlp\.gate$"]
MOE = r"re:.*layers\.[1-9]\d*\."
MAPPINGS = [
    AWQMapping("re:.*input_layernorm$", ["re:.*q_a_proj$", "re:.*kv_a_proj_with_mqa$"]),
    AWQMapping("re:.*q_a_layernorm$", ["re:.*q_b_proj$"]),
    AWQMapping("re:.*kv_a_layernorm$", ["re:.*kv_b_proj$"]),
    AWQMapping(
        r"re:.*layers\.0\.post_attention_layernorm$",
        [r"re:.*layers\.0\.mlp\.gate_proj$", r"re:.*layers\.0\.mlp\.up_proj$"],
    ),
    AWQMapping(
        f"{MOE}post_attention_layernorm$",
        [f"{MOE}mlp.gate$", f"{MOE}mlp.*gate_proj$", f"{MOE}mlp.*up_proj$"],
    ),
    AWQMapping("re:.*up_proj$", ["re:.*down_proj$"]),
]


def decode(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor as a runtime would compute with it; refuses a projection that is not on its grid."""
    weights = {name: tensor.detach().float() for name, tensor in model.state_dict().items()}
    official = load_weights(model_dir())
    for name, module in model.named_modules():
        if is_projection(f"{name}.weight"):
            args = module.quantization_scheme.weights
            decoded = fake_quantize(module.weight, module.weight_scale, module.weight_zero_point, args)
            weights[f"{name}.weight"] = decoded.detach().float()
    missing = [name for name in official if name not in weights]
    assert not missing, f"{len(missing)} tensors are missing, first {missing[0]}"
    return {name: weights[name] for name in official}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--observer", default="memoryless_minmax")
    parser.add_argument("--duo", choices=["yes", "no", "both"], default="yes")
    parser.add_argument("--all-experts", action="store_true", help="every token to every expert")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    # It locks the pages of its caches, which torch refuses on a machine without GPU.
    torch.Tensor.pin_memory = lambda tensor, *_: tensor
    model = linearize_moe(AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32))
    rows = calibration_windows(args.windows)
    dataset = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
    weights = QuantizationArgs(
        num_bits=args.bits,
        type="int",
        symmetric=not args.asymmetric,
        strategy="group",
        group_size=args.group,
        observer=args.observer,
    )
    watch = Stopwatch()
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(model_dir()),
        dataset=dataset,
        recipe=[
            AWQModifier(mappings=MAPPINGS, duo_scaling={"yes": True, "no": False, "both": "both"}[args.duo]),
            QuantizationModifier(
                config_groups={"all": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=IGNORED
            ),
        ],
        pipeline="sequential",
        batch_size=16,
        num_calibration_samples=args.windows,
        shuffle_calibration_samples=False,
        max_seq_length=rows.shape[1],
        moe_calibrate_all_experts=args.all_experts,
    )
    seconds = watch.read()
    tokens = "all tokens to all experts" if args.all_experts else "routed tokens only"
    grid = "asymmetric" if args.asymmetric else "symmetric"
    settings = f"AWQ, {args.observer}, {grid}, duo_scaling {args.duo}, {tokens}, {rows.numel():,} tokens"
    write_decoded(args.out, decode(model), settings, seconds, "llmcompressor")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_dir() / name, args.out / name)
    config = json.loads((args.out / "config.json").read_text())
    (args.out / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}, indent=1))


if __name__ == "__main__":
    main()
