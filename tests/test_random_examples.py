"""examples/random/make.py: models of other families that are read, planned and found sound."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from quantkit import inspect, plan, verify
from quantkit.inspect.folder import Inspection
from quantkit.plan.recipe import Recipe
from quantkit.tensors import Role

ROOT = Path(__file__).parents[1]
MAKE = ROOT / "examples" / "random" / "make.py"


def make(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(MAKE), *words],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("words", [(), ("kimi-k2.5",), ("llama", "out")])
def test_usage(words: tuple[str, ...]) -> None:
    done = make(*words)
    assert done.returncode == 1
    assert "kimi-k2.5|deepseek-v3.2 FOLDER" in done.stderr


def test_kimi_s_experts_are_int4_and_become_q4_0_without_rounding(tmp_path: Path) -> None:
    done = make("kimi-k2.5", str(tmp_path / "kimi"))
    assert done.returncode == 0, done.stderr
    assert not verify(tmp_path / "kimi").faults
    found = inspect(tmp_path / "kimi")
    assert isinstance(found, Inspection)
    assert not found.unusual
    (output,) = plan(tmp_path / "kimi", Recipe.from_yaml("repack-int4-gguf")).outputs
    experts = [decision for decision in output.decisions.values() if decision.spec.role is Role.EXPERT]
    assert experts
    assert all(decision.repacks for decision in experts)


def test_v3_2_has_an_mtp_layer_and_few_keys_to_choose(tmp_path: Path) -> None:
    done = make("deepseek-v3.2", str(tmp_path / "v3.2"))
    assert done.returncode == 0, done.stderr
    kept = {"name": "main", "format": "gguf", "preset": "Q4_K_M", "mtp": "keep"}
    warnings = plan(tmp_path / "v3.2", Recipe.model_validate({"version": 1, "outputs": [kept]})).warnings
    assert any("beyond 128 tokens it drafts otherwise" in line for line in warnings)
