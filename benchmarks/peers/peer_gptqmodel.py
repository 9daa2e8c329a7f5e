"""gptqmodel's GPTQ on tiny-deepseek-v3: model and calibration windows in, decoded float32 weights out.

    .venvs/gptqmodel/bin/python benchmarks/peers/peer_gptqmodel.py --scheme int4 --out DIR [--mse 2.4] [--gptaq 0.25]

The weights are decoded from the checkpoint it writes (GPTQ v1: int32 words along the inputs, zero points stored minus
one, float16 scales), so its float16 rounding of the scales is in.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its loader asks its CPU pool for two workers whatever the machine

import torch
from decoded import Stopwatch, write_decoded
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import FOEMConfig, GPTAQConfig
from gptqmodel.quantization.foem import FOEM
from gptqmodel.quantization.gptaq import GPTAQ
from protocol import (
    CALIBRATION_WINDOWS,
    GROUP_SIZE,
    NARROW_GROUP,
    bits_of,
    calibration_windows,
    is_projection,
    model_dir,
    narrow,
)
from safetensors.torch import load_file
from torch import Tensor

NOT_ROUTED = r"+:.*(self_attn|layers\.0\.mlp|shared_experts)\..*"


def unpack(words: Tensor, bits: int) -> Tensor:
    """(n, m) int32 whose columns are little-endian bit streams -> (n * 32 / bits, m) int64 codes."""
    shifts = torch.arange(32, dtype=torch.int64)
    stream = (words.long()[:, None, :] >> shifts[None, :, None]) & 1
    fields = stream.reshape(-1, bits, words.shape[1])
    return (fields << torch.arange(bits)[None, :, None]).sum(dim=1)


def decode_v1(tensors: dict[str, Tensor], module: str, bits: int) -> Tensor:
    """One projection (out, in) float32 = scale * (code - zero point) of its group."""
    codes = unpack(tensors[f"{module}.qweight"], bits)
    zeros = unpack(tensors[f"{module}.qzeros"].T, bits).T + 1
    scales = tensors[f"{module}.scales"].float()
    group = tensors[f"{module}.g_idx"].long()
    return ((codes - zeros[group]).float() * scales[group]).T


def decode(folder: Path, scheme: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    return {f"{module}.weight": decode_v1(tensors, module, bits_of(f"{module}.weight", scheme)) for module in modules}


def quantize_config(args: argparse.Namespace) -> QuantizeConfig:
    chosen: dict[str, Any] = {"damp_percent": args.damp, "mse": args.mse, "static_groups": args.static_groups or None}
    if args.desc_act:
        chosen |= {"desc_act": True, "act_group_aware": False}
    if args.gptaq:
        chosen["gptaq"] = GPTAQConfig(alpha=args.gptaq)
    if args.foem:
        chosen["foem"] = FOEMConfig(alpha=0, beta=args.foem)
    if args.scheme == "mixed":
        chosen["dynamic"] = {NOT_ROUTED: {"bits": 8}}
    elif odd := narrow():
        chosen["dynamic"] = {rf"+:^{re.escape(name)}$": {"group_size": NARROW_GROUP} for name in odd}
    bits = 4 if args.scheme == "mixed" else int(args.scheme.removeprefix("int"))
    chosen = {key: value for key, value in chosen.items() if value is not None}
    return QuantizeConfig(bits=bits, group_size=GROUP_SIZE, sym=True, device="cpu", offload_to_disk=False, **chosen)


def settings_of(config: QuantizeConfig) -> str:
    order = "desc_act" if config.desc_act else "act_group_aware" if config.act_group_aware else "plain order"
    parts = ["GPTQ", order, f"mse {config.mse:g}", f"damp {config.damp_percent:g}"]
    parts += ["static groups"] if config.static_groups else []
    parts += [f"GPTAQ alpha {config.gptaq.alpha:g}"] if config.gptaq else []
    parts += [f"FOEM alpha {config.foem.alpha:g} beta {config.foem.beta:g}"] if config.foem else []
    return ", ".join(parts)


def flatten_wide_inputs() -> None:
    """Let GPTAQ and FOEM see inputs of more than three dimensions as (batch, tokens, features).

    transformers 5.23 feeds kv_b_proj a 4-D tensor, which their accumulation refuses ("t() expects <= 2 dimensions").
    """
    for kind in (GPTAQ, FOEM):
        original = kind.process_batch

        def process_batch(self: Any, inp: Tensor, original: Any = original) -> Any:
            if getattr(self, "native_inps", None) and self.native_inps[0].dim() > 3:
                self.native_inps[0] = self.native_inps[0].flatten(1, -2)
            return original(self, inp.flatten(1, -2) if inp.dim() > 3 else inp)

        kind.process_batch = process_batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", choices=["int3", "int4", "mixed"], required=True)
    parser.add_argument("--damp", type=float)
    parser.add_argument("--mse", type=float, help="exponent of its scale search; absent: off, the default")
    parser.add_argument("--desc-act", action="store_true")
    parser.add_argument("--static-groups", action="store_true")
    parser.add_argument("--gptaq", type=float, help="alpha of GPTAQ")
    parser.add_argument("--foem", type=float, help="beta of FOEM, without GPTAQ")
    parser.add_argument("--windows", type=int, default=CALIBRATION_WINDOWS)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    flatten_wide_inputs()
    config = quantize_config(args)
    model = GPTQModel.load(str(model_dir()), config, dtype=torch.float32, trust_remote_code=False)
    rows = calibration_windows(args.windows)
    watch = Stopwatch()
    model.quantize([{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows], batch_size=16)
    seconds = watch.read()
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        weights = decode(Path(folder), args.scheme)
    assert all(is_projection(name) for name in weights)
    write_decoded(args.out, weights, settings_of(config), seconds, "gptqmodel")


if __name__ == "__main__":
    main()
