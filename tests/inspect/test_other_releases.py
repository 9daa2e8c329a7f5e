"""gpt-oss and DeepSeek V4: `inspect` counts their FP4, and says why nothing else is done with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quantkit import convert, plan
from quantkit.errors import ConfigError
from quantkit.inspect.folder import inspect_folder

N_EXPERTS, WIDTH, HIDDEN = 4, 96, 128


def codes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def exponents(*shape: int) -> Tensor:
    return torch.full(shape, 120, dtype=torch.uint8)


def written(folder: Path, tensors: dict[str, Tensor], architecture: str, **section: object) -> Path:
    tensors |= {"norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16)}
    save_file(tensors, folder / "model.safetensors")
    config = {"architectures": [architecture], "quantization_config": section}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def gpt_oss(folder: Path) -> Path:
    prefix = "model.layers.0.mlp.experts."
    tensors = {f"{prefix}gate_up_proj_bias": torch.zeros(N_EXPERTS, 2 * WIDTH, dtype=torch.bfloat16)}
    for name, n_out, n_in in (("gate_up_proj", 2 * WIDTH, HIDDEN), ("down_proj", HIDDEN, WIDTH)):
        tensors[f"{prefix}{name}_blocks"] = codes(N_EXPERTS, n_out, n_in // 32, 16)
        tensors[f"{prefix}{name}_scales"] = exponents(N_EXPERTS, n_out, n_in // 32)
    return written(folder, tensors, "GptOssForCausalLM", quant_method="mxfp4")


def deepseek_v4(folder: Path) -> Path:
    e8m0 = torch.float8_e8m0fnu
    tensors: dict[str, Tensor] = {}
    for expert in range(N_EXPERTS):
        for name, n_out, n_in in (("w1", WIDTH, HIDDEN), ("w2", HIDDEN, WIDTH), ("w3", WIDTH, HIDDEN)):
            module = f"layers.0.ffn.experts.{expert}.{name}"
            tensors[f"{module}.weight"] = codes(n_out, n_in // 2).view(torch.int8)
            tensors[f"{module}.scale"] = exponents(n_out, n_in // 32).view(e8m0)
    tensors["layers.0.attn.wq_a.weight"] = torch.ones(256, 200).to(torch.float8_e4m3fn)
    tensors["layers.0.attn.wq_a.scale"] = exponents(2, 2).view(e8m0)
    return written(folder, tensors, "DeepseekV4ForCausalLM", quant_method="fp8", weight_block_size=[128, 128])


def test_weights_are_counted(tmp_path: Path) -> None:
    """3 x 96 x 128 weights an expert, 4.25 bits each, whatever they are stored as."""
    for make, linears, others in ((gpt_oss, 2, {"bf16"}), (deepseek_v4, 3 * N_EXPERTS, {"bf16", "fp8 block"})):
        folder = tmp_path / make.__name__
        folder.mkdir()
        found = inspect_folder(make(folder))
        rows = {row.what: row for row in found.holdings}
        assert rows.keys() == {"MXFP4", *others}
        assert (rows["MXFP4"].weights, rows["MXFP4"].parameters) == (linears, N_EXPERTS * 3 * WIDTH * HIDDEN)
        assert rows["MXFP4"].bpw == 4.25
        (line,) = found.unusual
        assert "which quantkit does not compute" in line


def test_of_another_shape_nothing_is_claimed(tmp_path: Path) -> None:
    prefix = "layers.0.ffn.experts.0.w1"
    tensors = {f"{prefix}.weight": codes(8, 16), f"{prefix}.scale": exponents(8, 2), "a_blocks": codes(2, 2, 2, 16)}
    found = inspect_folder(written(tmp_path, {**tensors, "a_scales": exponents(2, 2, 3)}, "GptOssForCausalLM"))
    assert {row.what for row in found.holdings} == {"bf16", "unknown"}
    assert any(" and 1 more: stored as " in line for line in found.unusual)


@pytest.mark.parametrize("make", [gpt_oss, deepseek_v4])
def test_the_architecture_is_refused_before_the_storage(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path)
    for action in (
        lambda: plan(folder, "repack-mxfp4-gguf"),
        lambda: convert(folder, "repack-mxfp4-gguf", tmp_path / "out"),
    ):
        with pytest.raises(ConfigError, match="which quantkit does not compute") as refused:
            action()
        assert refused.value.hint.startswith("`quantkit inspect` shows what a checkpoint of any architecture holds.")
