"""Remake tests/formats/golden/*.safetensors: tiny linears packed by other packages, with their own decoding.

    python tools/golden_formats.py gptq           in an environment with gptqmodel (7.7.0 was used)
    python tools/golden_formats.py awq            the same
    python tools/golden_formats.py bitsandbytes   in an environment with bitsandbytes (0.50.2 was used)

Every case is a module `CASE` with its stored tensors, `CASE.decoded` by the package itself, and metadata `CASE` (JSON)
with the quantization_config that belongs to it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "formats" / "golden"
N_IN, N_OUT = 96, 32
Cases = dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]]


def linear(seed: int, n_out: int = N_OUT, n_in: int = N_IN) -> torch.nn.Linear:
    layer = torch.nn.Linear(n_in, n_out, bias=False, dtype=torch.float16)
    layer.weight.data = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed)).half()
    return layer


def grid(
    weight: torch.Tensor, groups: torch.Tensor, bits: int, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points (out, groups) float32, by the least and largest weight of each group."""
    scales, zeros = [], []
    for group in range(int(groups.max()) + 1):
        own = weight[:, groups == group].float()
        low, high = own.amin(1).clamp(max=0), own.amax(1).clamp(min=0)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scale = ((high - low) / (2**bits - 1)).half().float()
        zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-low / scale).round()
        scales.append(scale)
        zeros.append(zero.clamp(1, 2**bits - 1))  # zero points of 0 in layout v1 mean different things to readers
    return torch.stack(scales, 1), torch.stack(zeros, 1)


def gptq() -> Cases:
    """gptqmodel's packer and its torch kernel's dequantised weight."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module

    cases: Cases = {}
    for number, (bits, group_size, symmetric, act_order, layout) in enumerate(
        (bits, group_size, symmetric, act_order, layout)
        for bits, group_size in ((2, 32), (3, 32), (4, 32), (8, 32), (4, -1))
        for symmetric, act_order, layout in ((True, False, "gptq"), (False, True, "gptq"), (False, True, "gptq_v2"))
    ):
        width = N_IN if group_size < 0 else group_size
        groups = torch.arange(N_IN, dtype=torch.int32) // width
        if act_order:
            groups = groups[torch.randperm(N_IN, generator=torch.Generator().manual_seed(number))]
        layer = linear(number)
        scales, zeros = grid(layer.weight.data, groups, bits, symmetric=symmetric)
        module = TorchLinear(
            bits=bits, group_size=group_size, sym=symmetric, desc_act=act_order, in_features=N_IN, out_features=N_OUT,
            pack_dtype=torch.int32,
        )  # fmt: skip
        module.pack(layer, scales, zeros, groups)
        module.qzero_format(format=2)
        stored = {"qweight": module.qweight, "scales": module.scales, "g_idx": module.g_idx.int()}
        if layout == "gptq":
            config = type("Config", (), {"bits": bits, "pack_dtype": torch.int32})()
            convert_gptq_v2_to_v1_format_module(module, config)
            stored["qzeros"] = module.qzeros.clone()
            convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
        else:
            stored["qzeros"] = module.qzeros.clone()
        module.post_init()
        module.eval()
        decoded = module.dequantize_weight()
        assert (decoded.dtype, decoded.shape) == (torch.float16, (N_IN, N_OUT))
        stored["decoded"] = decoded.T
        section = {
            "quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": symmetric, "desc_act": act_order,
            "checkpoint_format": layout,
        }  # fmt: skip
        kind = f"{'sym' if symmetric else 'asym'}{'_act_order' if act_order else ''}"
        cases[f"w{bits}_g{width}_{kind}_{layout}"] = section, stored
    return cases


def awq() -> Cases:
    """gptqmodel's AWQ packer and its torch kernel's dequantised weight (AutoAWQ's layout and formula)."""
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    cases: Cases = {}
    for group_size in (32, 96):
        layer = linear(group_size)
        groups = torch.arange(N_IN) // group_size
        scales, zeros = grid(layer.weight.data, groups, 4, symmetric=False)
        module = AwqTorchLinear(
            bits=4, group_size=group_size, sym=False, desc_act=False, in_features=N_IN, out_features=N_OUT,
            pack_dtype=torch.int32,
        )  # fmt: skip
        module.pack(layer, scales.half(), zeros)
        decoded = dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, group_size)
        assert (decoded.dtype, decoded.shape) == (torch.float16, (N_IN, N_OUT))
        stored = {name: getattr(module, name) for name in ("qweight", "qzeros", "scales")}
        section = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
        cases[f"g{group_size}"] = section, {**stored, "decoded": decoded.T}
    return cases


def bitsandbytes() -> Cases:
    """bitsandbytes' CPU quantiser and its dequantize_4bit in float32.

    Where a row is no whole number of blocks, its CPU kernel (0.50.2) gives weights the scale of a neighbouring block;
    there the package's portable kernel decodes, which otherwise gives the same bits.
    """
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise, get_4bit_type, quantize_4bit

    cases: Cases = {}
    for number, (kind, block, nested, n_out, n_in) in enumerate(
        (
            ("nf4", 64, False, 16, 128),
            ("nf4", 64, True, 136, 128),  # more than 256 blocks
            ("nf4", 128, True, 16, 128),
            ("nf4", 64, False, 32, 96),
            ("fp4", 64, False, 16, 128),
            ("fp4", 128, True, 32, 96),
        )
    ):
        packed, state = quantize_4bit(
            linear(number, n_out, n_in).weight.data.bfloat16(),
            blocksize=block,
            compress_statistics=nested,
            quant_type=kind,
        )
        stored = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
        state.dtype = torch.float32
        absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
        portable = _dequantize_4bit_compute(
            packed.flatten(), absmax, get_4bit_type(kind, "cpu"), block, state.shape, torch.float32
        )
        assert n_in % block or torch.equal(portable, dequantize_4bit(packed, state))
        stored["decoded"] = portable
        section = {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": nested, "bnb_4bit_quant_storage": "uint8",
        }  # fmt: skip
        cases[f"{kind}_b{block}_k{n_in}{'_nested' if nested else ''}"] = section, {"weight": packed, **stored}
    return cases


def main(kind: str) -> None:
    cases = {"gptq": gptq, "awq": awq, "bitsandbytes": bitsandbytes}[kind]()
    tensors = {
        f"{case}.{name}": tensor.detach().clone().contiguous()
        for case, (_, stored) in cases.items()
        for name, tensor in stored.items()
    }
    path = GOLDEN / f"{kind}.safetensors"
    save_file(tensors, path, {case: json.dumps(section) for case, (section, _) in cases.items()})
    print(f"{path}: {', '.join(cases)}")


if __name__ == "__main__":
    main(sys.argv[1])
