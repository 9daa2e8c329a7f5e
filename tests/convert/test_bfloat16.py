"""A GPU calibrates in bfloat16 where the source has it. The same on a processor: nearly the numbers of float32."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantkit.arch import arch_of
from quantkit.arch.base import DenseBlock
from quantkit.convert.events import TensorDone
from quantkit.convert.layer import linears_of
from quantkit.convert.weights import LayerWeights
from quantkit.plan.machine import Machine
from quantkit.plan.recipe import Recipe
from quantkit.tensors import TensorInfo
from tests.convert.gguf_jobs import GPTQ, gguf_output, gguf_recipe, wide_config
from tests.convert.jobs import int4, recipe_of, run, small_config, write_model, write_text
from tests.tiny_models import random_weights

pytestmark = pytest.mark.usefixtures("one_thread")

PARTS = gguf_output({"match": "*kv_b_proj*", "scheme": "Q8_0", "method": {**GPTQ, "cross": 0.5}}, preset="Q4_K_M")
JOBS = {
    "int4": (small_config(), recipe_of(int4(grid=2, polish=1, cross=0.5), tokens=256)),
    "parts of a linear": (wide_config(), gguf_recipe(PARTS, tokens=256)),
}


def losses(model: Path, recipe: Recipe, out: Path) -> dict[str, float]:
    found: dict[str, float] = {}

    def note(event: Any) -> None:
        if isinstance(event, TensorDone):
            found[event.name] = event.error

    run(model, recipe, out, on_event=note)
    return found


@pytest.mark.parametrize("name", JOBS)
def test_calibration_in_bfloat16_ends_near_that_in_float32(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, recipe = JOBS[name]
    write_model(tmp_path / "model", config)
    write_text(tmp_path / "calibration.txt")
    exact = losses(tmp_path / "model", recipe, tmp_path / "exact")
    dtypes: set[torch.dtype] = set()
    monkeypatch.setattr(Machine, "scratch_dtype", torch.bfloat16)
    dtype_of = LayerWeights.dtype
    monkeypatch.setattr(
        LayerWeights, "dtype", lambda self, tensor: (dtypes.add(dtype := dtype_of(self, tensor)), dtype)[1]
    )
    found = losses(tmp_path / "model", recipe, tmp_path / "narrow")
    assert torch.bfloat16 in dtypes
    assert found.keys() == exact.keys()
    assert found != exact
    for tensor, loss in found.items():
        assert loss == pytest.approx(exact[tensor], rel=0.1), tensor


@pytest.mark.parametrize("narrow", ["q_b_proj", "kv_b_proj", "norm", "gate_proj", "up_proj", "down_proj"])
def test_linears_of_one_block_may_have_several_dtypes(narrow: str) -> None:
    config = small_config()
    arch, random = arch_of(config), random_weights(config, dtype=torch.float32)
    x = torch.randn(2, 16, arch.hidden_size, generator=torch.Generator().manual_seed(1))
    mixed = {name: weight.bfloat16() if narrow in name else weight for name, weight in random.items()}
    for sublayer in arch.sublayers(0):
        for block in sublayer:
            assert isinstance(block, DenseBlock)
            for stage in block.stages:
                pairs = zip(stage.inputs(mixed.__getitem__, x), stage.inputs(random.__getitem__, x), strict=True)
                for found, expected in pairs:
                    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.04 * float(expected.std()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_source_that_is_not_bfloat16_is_computed_in_float32(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, recipe = JOBS["int4"]
    write_model(tmp_path / "model", small_config(), dtype=dtype)
    write_text(tmp_path / "calibration.txt")
    exact = losses(tmp_path / "model", recipe, tmp_path / "exact")
    monkeypatch.setattr(Machine, "scratch_dtype", torch.bfloat16)
    assert losses(tmp_path / "model", recipe, tmp_path / "again") == exact


@pytest.mark.parametrize(("dtypes", "expected"), [(("BF16", "BF16"), torch.bfloat16), (("BF16", "F32"), torch.float32)])
def test_experts_are_held_in_bfloat16_if_all_of_them_compute_in_it(
    dtypes: tuple[str, str], expected: torch.dtype
) -> None:
    """What is quantised is what the source has, whatever the other experts are stored in."""
    infos = {str(n): TensorInfo(str(n), (2, 3), dtype) for n, dtype in enumerate(dtypes)}
    stored = {
        name: torch.randn(2, 3, generator=torch.Generator().manual_seed(int(name))).to(
            torch.bfloat16 if info.dtype == "BF16" else torch.float32
        )
        for name, info in infos.items()
    }
    source = SimpleNamespace(infos=lambda: infos, read=stored.__getitem__)
    layer = LayerWeights(
        source, {}, carries_quantised=True, cache_bytes=0, device=torch.device("cpu"), narrow=torch.bfloat16
    )
    job: Any = SimpleNamespace(weights=layer, device=torch.device("cpu"))
    found = linears_of(job, ("0", "1"), (0, 1)).weight
    assert found.dtype == expected
    assert all(torch.equal(one.float(), stored[name].float()) for one, name in zip(found, stored, strict=True))
