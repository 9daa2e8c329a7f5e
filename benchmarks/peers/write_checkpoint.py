"""A checkpoint of tiny-deepseek-v3 as other packages write it, calibrated on a few windows: for `quantkit verify`.

    .venvs/llmcompressor/bin/python benchmarks/peers/write_checkpoint.py llmcompressor W4A16 OUT
    .venvs/gptqmodel/bin/python benchmarks/peers/write_checkpoint.py gptqmodel int4 OUT
    .venvs/autoround/bin/python benchmarks/peers/write_checkpoint.py autoround auto_gptq OUT  (auto_round, auto_awq)

llm-compressor also takes NVFP4, MXFP8 and W4AFP8. The package's own defaults, model in bfloat16. auto-round makes a
folder with the model's name in OUT.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its loader asks its CPU pool for two workers whatever the machine

import torch
from protocol import CALIBRATION_WINDOWS, GROUP_SIZE, calibration_windows, model_dir

WINDOWS = 8
IGNORED = ["lm_head", r"re:.*mlp\.gate$"]


def llmcompressor(scheme: str, rows: torch.Tensor, out: Path) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model, tokenizer = linearize_moe(loaded()), tokenizer_of_model()
    kind = GPTQModifier if scheme == "W4A16" else QuantizationModifier
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()}),
        recipe=[kind(targets="Linear", scheme=scheme, ignore=IGNORED)],
        num_calibration_samples=len(rows),
        max_seq_length=rows.shape[1],
        batch_size=4,
    )
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


def gptqmodel(scheme: str, rows: torch.Tensor, out: Path) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    bits = int(scheme.removeprefix("int"))
    config = QuantizeConfig(bits=bits, group_size=GROUP_SIZE, sym=True, device="cpu", offload_to_disk=False)
    model = GPTQModel.load(str(model_dir()), config, dtype=torch.bfloat16, trust_remote_code=False)
    model.quantize([{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows], batch_size=4)
    model.save(str(out))


def autoround(scheme: str, rows: torch.Tensor, out: Path) -> None:
    from auto_round import AutoRound

    tuner = AutoRound(
        loaded(),
        tokenizer=tokenizer_of_model(),
        scheme="W4A16",
        dataset=list(rows.split(4)),
        iters=0,
        seqlen=rows.shape[1],
        nsamples=len(rows),
        batch_size=4,
        device_map="cpu",
        enable_torch_compile=False,
        amp=False,
    )
    tuner.quantize_and_save(str(out), format=scheme)


def loaded() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.bfloat16)


def tokenizer_of_model() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir())


PEERS: Mapping[str, Callable[[str, torch.Tensor, Path], None]] = {
    "llmcompressor": llmcompressor,
    "gptqmodel": gptqmodel,
    "autoround": autoround,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=list(PEERS))
    parser.add_argument("scheme")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    PEERS[options.peer](options.scheme, calibration_windows(CALIBRATION_WINDOWS)[:WINDOWS], options.out)


if __name__ == "__main__":
    main()
