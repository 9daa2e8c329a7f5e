"""Layers over GPUs under llama.cpp: nothing is lost, and llama.cpp's own rule puts every layer where the plan says."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
import pytest

from quantkit.errors import PlanError
from quantkit.plan.headers import SourceHeaders, read_headers
from quantkit.plan.plan import Plan, make_plan
from quantkit.plan.recipe import Recipe
from quantkit.runtimes.gpus import parse_gpus
from quantkit.runtimes.llama_cpp.memory import LlamaFit, fit_llama
from quantkit.tensors import Role
from tests.plan.test_plan import V3, tiny_headers


def plan_of(headers: SourceHeaders, preset: str, mtp: str = "drop") -> Plan:
    output = {"name": "main", "format": "gguf", "preset": preset, "mtp": mtp}
    recipe = Recipe.model_validate({"version": 1, "outputs": [output]})
    return make_plan(recipe, headers.arch, headers.infos, headers.stored)


@pytest.fixture(scope="module")
def v3() -> SourceHeaders:
    return read_headers(V3)


@pytest.fixture(scope="module")
def v3_plan(v3: SourceHeaders) -> Plan:
    return plan_of(v3, "Q4_K_M")


def placed_by_llama_cpp(found: LlamaFit, n_layers: int) -> list[int]:
    """GPU of each layer and of the head, in llama.cpp's float32 arithmetic: running sums of the shares, divided by the
    last, and the first above i / (n + 1)."""
    sums = np.cumsum(np.array(found.tensor_split, np.float32), dtype=np.float32)
    limits = [float(share) for share in sums / sums[-1]]
    return [bisect_right(limits, float(np.float32(i) / np.float32(n_layers + 1))) for i in range(n_layers + 1)]


@pytest.mark.parametrize("gpus", ["1xH200-141GB", "4xA100-80GB", "5xA100-80GB", "7xA100-80GB", "61xA100-80GB"])
def test_every_byte_and_layer_has_its_gpu(v3: SourceHeaders, v3_plan: Plan, gpus: str) -> None:
    output = v3_plan.outputs[0]
    found = fit_llama(output, v3.arch, parse_gpus(gpus), 32768)
    assert sum(found.weights) + found.host_bytes == output.nbytes
    assert sum(found.kv_bytes) == (512 + 64) * 2 * 32768 * 61
    expected = [gpu for gpu, count in enumerate(found.layers) for _ in range(count)]
    assert placed_by_llama_cpp(found, 61) == [*expected, expected[-1]]
    assert ("-ts" in found.options()) == (found.gpus.count > 1)


def test_v3_on_a100(v3: SourceHeaders, v3_plan: Plan) -> None:
    found = fit_llama(v3_plan.outputs[0], v3.arch, parse_gpus("5xA100-80GB"), 32768)
    assert found.layers == (14, 12, 12, 12, 11)
    assert [round(nbytes / 2**30, 1) for nbytes in found.weights] == [72.8, 76.0, 76.0, 76.0, 75.2]
    assert found.options() == "-ngl 99 -c 32768 -ts 14,12,12,12,12"
    assert found.fits
    longer = fit_llama(
        v3_plan.outputs[0], v3.arch, parse_gpus("5xA100-80GB"), (32768 + found.spare_kv_tokens) // 256 * 256
    )
    assert longer.fits
    assert longer.spare_kv_tokens < 300
    four = fit_llama(v3_plan.outputs[0], v3.arch, parse_gpus("4xA100-80GB"), 32768)
    assert (four.fits, four.spare_kv_tokens) == (False, 0)
    with pytest.raises(PlanError, match="at most 163,840 tokens") as caught:
        fit_llama(v3_plan.outputs[0], v3.arch, parse_gpus("5xA100-80GB"), 200_000)
    assert caught.value.hint == "Give --context 163840 or less."


def test_more_gpus_than_layers() -> None:
    headers = tiny_headers()
    found = fit_llama(plan_of(headers, "Q8_0").outputs[0], headers.arch, parse_gpus("5xT4-16GB"), 128)
    assert found.layers == (1, 1, 1, 0, 0)
    assert found.tensor_split == (1, 1, 2, 0, 0)
    assert placed_by_llama_cpp(found, 3) == [0, 1, 2, 2]


def test_mtp_is_a_layer_and_tied_embeddings_are_loaded_twice() -> None:
    headers = tiny_headers()
    output = plan_of(headers, "Q8_0", mtp="keep").outputs[0]
    found = fit_llama(output, headers.arch, parse_gpus("1xT4-16GB"), 128)
    assert found.layers == (4,)
    assert sum(found.weights) + found.host_bytes == output.nbytes
    headers = tiny_headers(tie_word_embeddings=True)
    output = plan_of(headers, "Q8_0").outputs[0]
    found = fit_llama(output, headers.arch, parse_gpus("1xT4-16GB"), 128)
    embedding = sum(size.nbytes for size in output.sizes if size.role is Role.EMBED)
    assert found.host_bytes == embedding
    assert sum(found.weights) == output.nbytes
