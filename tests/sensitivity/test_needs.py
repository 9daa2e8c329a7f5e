"""What a pass needs, said before it begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
import torch

from quantkit.arch import arch_of
from quantkit.arch.base import ModelArch
from quantkit.documents.sensitivity import FisherJob
from quantkit.errors import PlanError
from quantkit.plan.machine import Machine
from quantkit.sensitivity.needs import check_memory, needs_of, schedule_of

V3 = Path(__file__).resolve().parents[2] / "examples" / "deepseek-v3-671b" / "config.json"


@pytest.fixture(scope="module")
def arch() -> ModelArch:
    return arch_of(json.loads(V3.read_text()))


def job_of(arch: ModelArch, dtype: Literal["F32", "BF16"]) -> FisherJob:
    return FisherJob(
        quantkit="",
        torch="",
        source="",
        tokens_sha256="",
        rows=16,
        length=2048,
        seed=0,
        device="cpu",
        threads=1,
        dtype=dtype,
        hidden=arch.hidden_size,
        sublayers=tuple(len(arch.sublayers(layer)) for layer in range(arch.n_layers)),
    )


@pytest.mark.parametrize(("dtype", "width"), [("BF16", 2), ("F32", 4)])
def test_disk_of_v3(dtype: Literal["F32", "BF16"], width: int, arch: ModelArch) -> None:
    """Three vectors of the residual stream's width for each token and layer, and little else."""
    vectors = 61 * 3 * 32_768 * 7168 * width
    assert vectors < needs_of(arch, job_of(arch, dtype)).disk < vectors + 25_000_000


def test_a_budget_that_is_too_small_is_a_line(arch: ModelArch) -> None:
    needs = needs_of(arch, job_of(arch, "F32"))
    with pytest.raises(PlanError, match=r"memory budget 0\.25 GiB: this pass needs at least") as caught:
        check_memory(needs, Machine(torch.device("cpu"), 2**28))
    assert "The largest need is autograd: 12 x 2,048 tokens" in caught.value.hint
    check_memory(needs, Machine(torch.device("cpu"), 2**36))


def test_steps(arch: ModelArch) -> None:
    """Every layer forward, every layer back; a dense layer takes less than an MoE layer on so many tokens."""
    steps = schedule_of(arch, job_of(arch, "BF16"), 5e14)
    assert [(step.kind, step.layer) for step in steps] == [
        *(("forward", layer) for layer in range(61)),
        *(("backward", layer) for layer in reversed(range(61))),
    ]
    assert steps[122 - 10].seconds > 2 * steps[9].seconds
