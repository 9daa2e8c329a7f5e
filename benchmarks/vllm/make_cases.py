"""A random model of DeepSeek V3's architecture, in FP8 blocks as the official release, and what `quantkit convert`
makes of it by several recipes: the folders that `run_vllm.py` loads. Needs no GPU; a few minutes.

    python benchmarks/vllm/make_cases.py [--device cuda] [--model v2-lite] [--cases int4 gptq] DIR

DIR then holds ``source`` (FP8), ``bf16`` (the same weights decoded, not quantised: the noise floor), one folder a case,
``recipes/`` and ``prompts.json``. The attention has the shapes that vLLM's MLA kernels are compiled for; everything
else is small, so that a case is some 20 to 50 MB. ``--model``: another family that has this layer.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.arch import relatives  # noqa: E402
from tests.tiny_models import tiny_config, write_checkpoint, write_shards  # noqa: E402

VOCAB = 1024
MODEL: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 512,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 256,
    "n_routed_experts": 16,
    "num_attention_heads": 16,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 16,
    "q_lora_rank": 256,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": VOCAB,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
}

INDEXER = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
SPARSE: dict[str, Any] = {**MODEL, **INDEXER, "num_attention_heads": 64, "num_key_value_heads": 64}
MODELS: dict[str, Callable[[], dict[str, Any]]] = {
    "v3": lambda: tiny_config(**MODEL),
    "kimi-k2": lambda: tiny_config(**{**MODEL, "model_type": "kimi_k2", **relatives.KIMI_TEXT, "n_routed_experts": 48}),
    "v2-lite": lambda: relatives.deepseek_v2(**{**MODEL, "q_lora_rank": None}),
    "glm-flash": lambda: relatives.glm4_moe_lite(
        **{**MODEL, "first_k_dense_replace": 1, "qk_nope_head_dim": 192, "v_head_dim": 256, "rope_scaling": None}
    ),
    "v32": lambda: relatives.deepseek_v32(**SPARSE),
    # vLLM 0.24 takes the router for one of DeepSeek V2's where config.json does not say both.
    "glm-dsa": lambda: relatives.glm_moe_dsa(
        **{**SPARSE, "rope_scaling": None, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    ),
}
"""Name of a model -> its config.json."""

HEAD = "version: 1\ncalibration: {data: [builtin:mixed], tokens: 8192, sequence_length: 256, seed: 0}\noutputs:\n"
INT4 = "scheme: {kind: int, bits: 4, group_size: 128, symmetric: true}"
INT8 = "scheme: {kind: int, bits: 8, group_size: 128, symmetric: true}"
GPTQ = "method: {kind: gptq}"
DROP_MTP = '{match: "role:mtp", drop: true}'
KEPT = '{match: "role:norm|router|embed|lm_head", keep: source}'
EXPERTS = f'{{match: "role:expert", {INT4}, {GPTQ}}}'
LINEARS8 = f'{{match: "role:attention|shared_expert|mlp", {INT8}, {GPTQ}}}'

LINEARS = "role:expert|attention|shared_expert|mlp"


def all_linears(scheme: str, method: str = GPTQ) -> tuple[str, ...]:
    """Rules that quantise every linear alike and drop the MTP layer."""
    return (DROP_MTP, KEPT, f'{{match: "{LINEARS}", scheme: {{{scheme}}}, {method}}}')


INTEGER = "kind: int, bits: 4, group_size: 128"
DENSE = "role:attention|shared_expert|mlp"
CASES: dict[str, tuple[str, ...]] = {
    "int4": all_linears(INTEGER),
    "int4-awq": all_linears(INTEGER, "method: {kind: awq, then: gptq}"),
    "gptq": all_linears(f"{INTEGER}, scale_dtype: float16"),
    "gptq-int4-int8": (DROP_MTP, KEPT, EXPERTS, LINEARS8),
    "awq": all_linears(f"{INTEGER}, symmetric: false, scale_dtype: float16"),
    "nvfp4": all_linears("kind: nvfp4"),
    "mxfp4": all_linears("kind: mxfp4"),
    "mxfp8": all_linears("kind: mxfp8"),
    "w4afp8-int8": (DROP_MTP, KEPT, '{match: "role:expert", scheme: {kind: w4afp8}, method: {kind: gptq}}', LINEARS8),
    "int4-int8": (DROP_MTP, KEPT, EXPERTS, LINEARS8),
    "int4-bf16": (DROP_MTP, KEPT, EXPERTS, '{match: "*", keep: bf16}'),
    "int4-int8-mtp": (
        f'{{match: "role:mtp", {INT4}, {GPTQ}}}',
        '{match: "role:mtp|norm|router|embed|lm_head", keep: source}',
        EXPERTS,
        LINEARS8,
    ),
    "dense-int4": (DROP_MTP, KEPT, f'{{match: "{DENSE}", scheme: {{{INTEGER}}}, {GPTQ}}}', '{match: "*", keep: bf16}'),
    "dense-gptq": (
        DROP_MTP,
        KEPT,
        f'{{match: "{DENSE}", scheme: {{{INTEGER}, scale_dtype: float16}}, {GPTQ}}}',
        '{match: "*", keep: bf16}',
    ),
    "int4-fp8": (DROP_MTP, KEPT, EXPERTS, '{match: "*", keep: source}'),
}
"""Name of the case -> rules of its recipe."""
FORMATS = {"gptq": "gptq", "gptq-int4-int8": "gptq", "dense-gptq": "gptq", "awq": "awq"}
"""Of the cases that are not in compressed-tensors."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the checkpoints that run_vllm.py loads.")
    parser.add_argument("--device", default="cpu", help="that converts")
    parser.add_argument("--model", default="v3", choices=MODELS, help="the model's family")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("directory", type=Path)
    given = parser.parse_args()
    directory: Path = given.directory
    directory.mkdir(parents=True, exist_ok=True)
    make_source(directory, MODELS[given.model]())
    (directory / "recipes").mkdir(exist_ok=True)
    for name in given.cases:
        recipe = directory / "recipes" / f"{name}.yaml"
        listed = "".join(f"      - {rule}\n" for rule in CASES[name])
        layout = FORMATS.get(name, "compressed-tensors")
        recipe.write_text(f"{HEAD}  - name: {name}\n    format: {layout}\n    rules:\n{listed}")
        convert(directory / "source", recipe, directory / name, given.device)
    tokens = torch.randint(VOCAB, (4, 64), generator=torch.Generator().manual_seed(1))
    (directory / "prompts.json").write_text(json.dumps(tokens.tolist()))


def make_source(directory: Path, config: dict[str, Any]) -> None:
    """The FP8 checkpoint with a byte-level tokenizer, and its decoded main model in BF16."""
    decoded = write_checkpoint(directory / "source", config, seed=0, fp8=True)
    write_tokenizer(directory / "source")
    mtp = f"model.layers.{config['num_hidden_layers']}."
    main_model = {name: tensor for name, tensor in decoded.items() if not name.startswith(mtp)}
    write_shards(directory / "bf16", main_model)
    plain = {**config, "num_nextn_predict_layers": 0}
    (directory / "bf16" / "config.json").write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")


def write_tokenizer(folder: Path) -> None:
    """One token a byte: enough for calibration text to become token ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = ("<bos>", "<eos>")
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    names = {"bos_token": special[0], "eos_token": special[1], "add_bos_token": True, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def convert(source: Path, recipe: Path, out: Path, device: str) -> None:
    """The command as a user runs it, in a process of its own."""
    shutil.rmtree(out, ignore_errors=True)
    code = "import sys; from quantkit.cli.app import main; sys.argv[0] = 'quantkit'; main()"
    words = ["convert", source, "-r", recipe, "-o", out, "--device", device, "--jobs", "1", "--restart"]
    subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
