"""`evaluate` on GPTQ, AWQ and bitsandbytes folders of nano: what they decode to, and nothing else, is scored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from quantkit import convert, evaluate
from quantkit.documents.evaluation import Evaluation
from quantkit.errors import SourceError
from tests.evaluate.test_evaluation import BUDGET, NANO, ROOT, W4, config_of, outputs
from tests.formats.test_other_packages import golden
from tests.oracles import gguf_writer
from tests.tiny_models import write_shards

TEXT = str(ROOT / "calibration_data" / "eval" / "prose.txt")
GROUP, BLOCK = 128, 64
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def run(*candidates: Path) -> Evaluation:
    options: dict[str, Any] = {"text": (TEXT,), "context": 24, "max_windows_per_file": 2, "noise_floor": False}
    return evaluate(NANO, candidates, memory_budget=BUDGET, **options)


@pytest.fixture(scope="module")
def w4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano's linears as 4 bits in groups, by quantkit."""
    root = tmp_path_factory.mktemp("w4")
    listed = {"name": "w4", "format": "compressed-tensors", "rules": [W4, {"match": "*", "keep": "source"}]}
    convert(NANO, outputs(listed), root / "w4", memory_budget=BUDGET)
    return root / "w4"


def stored(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            found.update((name, shard.get_tensor(name)) for name in shard.keys())  # noqa: SIM118 (not a dict)
    return {name: tensor for name, tensor in found.items() if ".layers.3." not in name}  # without MTP


def gptq(words: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """Eight codes to a word along the inputs, in both formats: only transposed. Zero points of 8, stored less one."""
    n_out, n_groups = scales.shape
    return {
        "qweight": words.T.contiguous(),
        "scales": scales.T.contiguous(),
        "qzeros": torch.full((n_groups, n_out // 8), 0x77777777, dtype=torch.int32),
        "g_idx": torch.arange(words.shape[1] * 8, dtype=torch.int32) // GROUP,
    }


def awq(words: Tensor, scales: Tensor) -> dict[str, Tensor]:
    n_out, n_groups = scales.shape
    codes = (words.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32) & 15).flatten(1).T
    packed = torch.zeros(len(codes), n_out // 8, dtype=torch.int32)
    for nibble, output in enumerate(AWQ_ORDER):
        packed |= codes[:, output::8] << 4 * nibble
    zeros = torch.full((n_groups, n_out // 8), -0x77777778, dtype=torch.int32)  # 0x88888888
    return {"qweight": packed, "scales": scales.T.contiguous(), "qzeros": zeros}


SECTIONS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
}


def write(folder: Path, tensors: dict[str, Tensor], section: dict[str, Any]) -> Path:
    write_shards(folder, tensors)
    (folder / "config.json").write_text(json.dumps({**config_of(NANO), "quantization_config": section}))
    return folder


def repacked(w4: Path, folder: Path, pack: Callable[[Tensor, Tensor], dict[str, Tensor]]) -> Path:
    tensors = stored(w4)
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        module = name.removesuffix(".weight_packed")
        for part, tensor in pack(tensors.pop(name), tensors.pop(f"{module}.weight_scale")).items():
            tensors[f"{module}.{part}"] = tensor
        tensors.pop(f"{module}.weight_shape", None)
    return write(folder, tensors, SECTIONS[pack.__name__])


def test_gptq_and_awq_score_as_the_same_numbers_in_compressed_tensors(w4: Path, tmp_path: Path) -> None:
    found = run(w4, repacked(w4, tmp_path / "gptq", gptq), repacked(w4, tmp_path / "awq", awq))
    first, *others = found.candidates
    assert [candidate.model.format for candidate in found.candidates] == ["compressed-tensors", "GPTQ", "AWQ"]
    assert first.result.overall.kld.mean > 1e-3
    assert first.result.draft is not None
    for other in others:
        assert other.result == first.result.model_copy(update={"draft": None})  # repacked without the MTP layer
        assert 4.1 < other.model.bpw < 7
    assert others[0].model.nbytes > others[1].model.nbytes  # g_idx


def test_nf4_scores_as_its_decoded_twin(tmp_path: Path) -> None:
    """Every linear but lm_head in NF4, beside a float32 folder of what it stands for."""
    weights = {
        name: weight for name, weight in gguf_writer.read_weights(NANO).items() if ".layers.3." not in name
    }  # without MTP
    section, parts, _ = golden("bitsandbytes", "nf4_b64_k128")
    quant_map = parts["weight.quant_map"]
    packed, decoded = dict(weights), dict(weights)
    for name in [name for name in weights if "_proj" in name]:
        weight = weights[name].float()
        blocks = weight.view(-1, BLOCK)
        absmax = blocks.abs().amax(1)
        codes = (blocks / absmax.unsqueeze(-1)).unsqueeze(-1).sub(quant_map).abs().argmin(-1).to(torch.uint8)
        decoded[name] = (quant_map[codes.int()] * absmax.unsqueeze(-1)).view_as(weight)
        pairs = codes.view(-1, 2)
        packed[name] = (pairs[:, :1] << 4 | pairs[:, 1:]).contiguous()
        packed[f"{name}.absmax"], packed[f"{name}.quant_map"] = absmax, quant_map.clone()
        state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": list(weight.shape)}
        text = json.dumps(state).encode()
        packed[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    write_shards(tmp_path / "f32", decoded)
    config = {key: value for key, value in config_of(NANO).items() if key != "quantization_config"}
    (tmp_path / "f32" / "config.json").write_text(json.dumps(config))
    found = run(write(tmp_path / "nf4", packed, section), tmp_path / "f32")
    nf4, twin = found.candidates
    assert (nf4.model.format, twin.model.format) == ("bitsandbytes", "BF16")
    assert nf4.result == twin.result
    assert nf4.result.overall.kld.mean > 1e-3


def test_fp8_beside_packed_linears_is_not_taken_for_numbers(w4: Path, tmp_path: Path) -> None:
    tensors = stored(repacked(w4, tmp_path / "whole", gptq))
    module = "model.layers.1.self_attn.o_proj"
    n_in, n_out = tensors[f"{module}.g_idx"].shape[0], tensors[f"{module}.scales"].shape[1]
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{module}.{part}"]
    tensors[f"{module}.weight"] = torch.zeros(n_out, n_in).to(torch.float8_e4m3fn)
    with pytest.raises(SourceError, match=r"o_proj\.weight is F8_E4M3, neither packed"):
        run(write(tmp_path / "mixed", tensors, SECTIONS["gptq"]))


def test_an_expert_that_is_missing_is_named(w4: Path, tmp_path: Path) -> None:
    tensors = stored(repacked(w4, tmp_path / "whole", awq))
    module = "model.layers.2.mlp.experts.5.up_proj"
    lost = {name: tensor for name, tensor in tensors.items() if not name.startswith(module)}
    with pytest.raises(SourceError, match=rf"lacks the tensor {module}\.weight"):
        run(write(tmp_path / "lost", lost, SECTIONS["awq"]))
    del tensors[f"{module}.qzeros"]
    with pytest.raises(SourceError, match=r"up_proj\.qzeros is missing"):
        run(write(tmp_path / "part", tensors, SECTIONS["awq"]))
