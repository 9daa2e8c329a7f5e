"""What `benchmarks/vllm/humming_kernels.py` does without a GPU: its bytes, its oracle, and the order of experts' rows.

The kernels are played by a layer that follows Humming's documentation of its arguments.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.formats.bitpack import unpack
from quantkit.schemes import IntScheme

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "vllm" / "humming_kernels.py"
SHAPE, TOKENS, EXPERTS, TOP_K, BLOCK = (48, 128), 7, 4, 2, 8


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("humming_kernels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


class Layer:
    """Products in float64 as Humming describes them: rows by index, or rows sorted by expert."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights.double()

    def __call__(self, inputs: Tensor, compute_config: dict[str, str], top_k: int = 1, **given: Any) -> Tensor:
        inputs = inputs.double()
        if compute_config["gemm_type"] == "dense":
            return inputs @ self.weights[0].T
        rows = inputs if "expert_layout" in given else inputs.repeat_interleave(top_k, 0)
        result = torch.full((len(rows), self.weights.shape[1]), torch.nan, dtype=torch.float64)
        for expert, own in self.owned(given):
            own = own[own < len(rows)]
            result[own] = rows[own] @ self.weights[expert].T
        return result

    def owned(self, given: dict[str, Any]) -> list[tuple[int, Tensor]]:
        if "expert_layout" in given:
            starts = given["expert_layout"].tolist()
            return [(expert, torch.arange(*starts[expert : expert + 2])) for expert in range(len(starts) - 1)]
        blocks = given["sorted_ids"][: int(given["num_tokens_padded"])].long().split(BLOCK)
        assert len(blocks) == len(given["expert_ids"])
        return list(zip(given["expert_ids"].tolist(), blocks, strict=True))


@pytest.mark.parametrize("form", ["dense", "indexed", "grouped_contiguous"])
def test_rows_reach_their_experts(script: ModuleType, form: str) -> None:
    many = {} if form == "dense" else {"experts": EXPERTS, "top_k": TOP_K}
    case = script.Case(IntScheme(bits=3), form, SHAPE, TOKENS, **many)
    prepared = script.prepare(case, kernel=False)
    prepared.tuning = {"block_shape": [BLOCK, 128, 64]}
    prepared.layer = Layer(script.make_weights(case.scheme, SHAPE, case.experts, "cpu").decoded)
    found = script.product(prepared)()
    assert found.shape == (TOKENS * case.top_k, SHAPE[0])
    assert script.difference(found, prepared.wanted) < 1e-12


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_bytes_are_those_of_the_decoded_weights(script: ModuleType, bits: int) -> None:
    weights = script.make_weights(IntScheme(bits=bits), SHAPE, EXPERTS, "cpu")
    assert weights.packed["weight_packed"].shape == (EXPERTS, SHAPE[0], SHAPE[1] * bits // 32)
    assert weights.packed["weight_shape"].tolist() == [list(SHAPE)] * EXPERTS
    codes = unpack(weights.packed["weight_packed"][1], bits, SHAPE[1])
    decoded = (codes.float() - 2 ** (bits - 1)) * weights.packed["weight_scale"][1].float()
    assert torch.equal(decoded, weights.decoded[1])
    assert 0.2 < weights.negative < 0.8


def test_rows_of_a_case(script: ModuleType) -> None:
    row = script.prepare(script.Case(IntScheme(), "dense", SHAPE, TOKENS), kernel=False).row
    assert row["noise"] < 0.01 < row["unquantised"] < row["signs_dropped"]
    assert "no kernel" in script.line(row)
    assert json.loads(json.dumps(script.document([row], kernel=False)))["rows"][0]["case"] == "int4 g128 dense"
    asymmetric = script.Case(IntScheme(symmetric=False), "dense", SHAPE, TOKENS)
    assert "signs_dropped" not in script.prepare(asymmetric, kernel=False).row
