"""How long a conversion takes: what a machine's speed is, where it is kept, and what follows for each step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.documents.speed import DiskSpeed, KernelSpeed, SpeedDocument
from quantkit.plan import benchmark
from quantkit.plan.costs import schedule
from quantkit.plan.duration import duration_of
from quantkit.plan.forecast import Forecast, forecast
from quantkit.plan.recipe import Recipe
from quantkit.plan.schedule import FILES, KEPT, OUTSIDE, SCORES, VALIDATION, Schedule, layer_work
from quantkit.plan.speed import (
    MAX_BYTES,
    cache_folder,
    disk_key,
    is_complete,
    likely_device,
    machine_key,
    read_speed,
    save_speed,
    treatments,
)
from quantkit.quantizers import Gptq, Rtn
from quantkit.schemes import GgmlScheme, IntScheme
from quantkit.text.forecast import forecast_document, forecast_text
from tests.conftest import DISK, KERNEL, MEASURED, SPEED

ROOT = Path(__file__).resolve().parents[2]
NANO, V3 = ROOT / "examples/nano-deepseek-v3", ROOT / "examples/deepseek-v3-671b"
INT4 = IntScheme(bits=4, group_size=128)
CPU = torch.device("cpu")


def steps_of(found: Forecast, speed: SpeedDocument = SPEED, disk: DiskSpeed = DISK) -> Schedule:
    known = speed.model_copy(update={"kernels": speed.kernels or dict.fromkeys(treatments(found.plan), KERNEL)})
    return schedule(found.plan, found.source.arch, found.needs.work, known, disk)


def seconds_of(steps: Schedule, kind: str, layer: int | None) -> float:
    return sum(step.seconds for step in steps if (step.kind, step.layer) == (kind, layer))


@pytest.fixture(scope="module")
def v3() -> Forecast:
    return forecast(V3, Recipe.from_yaml("deepseek-v3-w4a16-gptq"))


# --------------------------------------------------------------------------------------------------------------- steps


def test_steps_stand_in_the_order_of_the_work() -> None:
    found = forecast(NANO, Recipe.from_yaml("nano-demo"))
    steps = steps_of(found)
    dense, moe = ["attention", "mlp", KEPT], ["attention", "shared_experts", "experts", KEPT]
    expected = [(OUTSIDE, None), *((kind, 0) for kind in dense), *((kind, layer) for layer in (1, 2) for kind in moe)]
    after = [(FILES, None), *((VALIDATION, layer) for layer in range(3)), (SCORES, None)]
    assert [(step.kind, step.layer) for step in steps if step.layer != 3] == expected + after
    assert all(step.seconds >= 0 for step in steps)


def test_a_layer_with_experts_weighs_as_much_as_its_experts(v3: Forecast) -> None:
    """What was taken for the mean of all layers while only the dense ones were done: 2 h 57 min for a job of 34 h."""
    steps = steps_of(v3)
    layers = [sum(step.seconds for step in steps if step.layer == n and step.kind != VALIDATION) for n in range(61)]
    assert layers[0] == pytest.approx(layers[2])
    assert layers[3] == pytest.approx(layers[60], rel=0.01)  # no hidden states are saved after the last
    assert layers[3] > 3 * layers[0]


def test_products_of_a_layer_are_counted(v3: Forecast) -> None:
    """With everything else infinitely fast, the seconds of V3's routed experts are their products."""
    free = KernelSpeed(call=0, weight=0, column=0, rescale=0, decode=0)
    fast: Mapping[str, Any] = {"memory": 1e18, "new_memory": 1e18, "call": 0, "factor_square": 0, "factor_cube": 0}
    speed = SPEED.model_copy(update={**fast, "kernels": dict.fromkeys(treatments(v3.plan), free), "flops": 1e12})
    steps = steps_of(v3, speed, DiskSpeed(read=1e18, write=1e18))
    work = v3.needs.work
    tokens, streams, hidden, inter, experts, top_k = work.tokens, work.streams, 7168, 2048, 256, 8
    forward = 2 * tokens * top_k * 3 * hidden * inter * streams
    squares = 2 * tokens * (top_k * (hidden**2 + inter**2) + hidden**2) * streams
    assert tokens * top_k / experts > 2048, "no expert borrows tokens"
    assert seconds_of(steps, "experts", 3) == pytest.approx((forward + squares) / 1e12, rel=1e-3)


def test_factors_and_codes_are_counted(v3: Forecast) -> None:
    none: Mapping[str, Any] = {"flops": 1e18, "memory": 1e18, "new_memory": 1e18, "call": 0}
    kernels = dict.fromkeys(treatments(v3.plan), KernelSpeed(call=0, weight=1e-6, column=1e-9, rescale=0, decode=0))
    speed = SPEED.model_copy(update={**none, "kernels": kernels, "factor_square": 0, "factor_cube": 1e-12})
    steps = steps_of(v3, speed, DiskSpeed(read=1e18, write=1e18))
    factors = 256 * (7168**3 + 2048**3) * 1e-12
    weights = 256 * 7168 * 2048
    codes = weights * (2 * (1e-6 + 7168e-9) + (1e-6 + 2048e-9))
    assert seconds_of(steps, "experts", 3) == pytest.approx(factors + codes, rel=1e-3)


def test_a_conversion_without_calibration_is_rounding_and_moving() -> None:
    found = forecast(V3, Recipe.from_yaml("deepseek-v3-w4a16-rtn"))
    steps = steps_of(found)
    cost = sum((step.cost for step in steps[1:]), steps[0].cost)
    assert cost.ahead == pytest.approx(found.plan.source_bytes / DISK.read, rel=0.05)  # MTP's are not read
    assert cost.writing == pytest.approx(found.outputs[0].nbytes / DISK.write, rel=1e-3)
    assert not any(step.kind == VALIDATION for step in steps) or found.plan.recipe.validation is not None


def test_layers_of_an_evaluation(v3: Forecast) -> None:
    few, many = layer_work(v3.source.arch, 1), layer_work(v3.source.arch, 10**6)
    assert few[3] / few[0] > many[3] / many[0] > 1  # tokens meet 8 of 256 experts, but all are read


# --------------------------------------------------------------------------------------------------------------- speed


@pytest.mark.parametrize("scheme", [INT4, GgmlScheme(type="Q4_K")], ids=["int4", "Q4_K"])
@pytest.mark.parametrize("method", [Rtn.model_validate({}), Gptq.model_validate({})], ids=["rtn", "gptq"])
def test_the_benchmark_finds_numbers(scheme: IntScheme | GgmlScheme, method: Rtn | Gptq) -> None:
    _, kernel, _ = MEASURED
    found = kernel(scheme, method, CPU)
    assert found.weight > 0
    assert found.decode > 0
    assert found.weight + 256 * found.column < 1e-3  # seconds for a weight


def test_the_benchmark_leaves_random_numbers_alone(tmp_path: Path) -> None:
    base, _, disk = MEASURED
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = base(CPU, "here")
    assert torch.equal(torch.get_rng_state(), before)
    assert found.factor_cube > 0
    assert found.flops > 1e6
    assert disk(NANO, tmp_path).write > 1
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_counts_as_it_is_read() -> None:
    *_, disk = MEASURED
    found = disk(NANO, Path("/proc/nowhere"))
    assert found.read == found.write


def test_only_what_is_missing_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked: list[str] = []
    monkeypatch.setattr(benchmark, "_kernel", lambda scheme, method, device: asked.append(method.kind) or KERNEL)
    for recipe in ("nano-demo", "nano-demo", "nano-gguf"):
        plan = forecast(NANO, Recipe.from_yaml(recipe)).plan
        before = len(asked)
        found = benchmark.measured(plan, CPU, "machine", NANO, tmp_path)
        assert is_complete(found, treatments(plan), disk_key(NANO, tmp_path))
        if recipe == "nano-demo":
            assert len(asked) == len(treatments(plan))
        else:
            assert len(asked) - before < len(treatments(plan)) + 1
    assert (tmp_path / "quantkit").is_dir()


# --------------------------------------------------------------------------------------------------------------- cache


def test_what_was_measured_is_kept(tmp_path: Path) -> None:
    found = SPEED.model_copy(update={"machine": "a", "kernels": {"k": KERNEL}, "disks": {"1 1": DISK}})
    save_speed(found, tmp_path)
    assert read_speed("a", tmp_path) == found
    assert read_speed("b", tmp_path) is None


@pytest.mark.parametrize(
    "change",
    [
        {"flops": 0},
        {"flops": 1e300},
        {"flops": "fast"},
        {"call": -1},
        {"machine": "another"},
        {"machine": "a" * 1000},
        {"version": 2},
        {"kernels": {"k": {"call": 1e9, "weight": 0, "column": 0, "decode": 0}}},
        {"kernels": {str(n): KERNEL.model_dump() for n in range(501)}},
        {"disks": {"1": {"read": None, "write": 1}}},
    ],
)
def test_a_damaged_cache_counts_as_none(tmp_path: Path, change: dict[str, object]) -> None:
    save_speed(SPEED.model_copy(update={"machine": "a"}), tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert read_speed("a", tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 10_000, b" " * (MAX_BYTES + 1), b"NaN", b"{}"])
def test_a_cache_that_is_no_document_counts_as_none(tmp_path: Path, content: bytes) -> None:
    save_speed(SPEED.model_copy(update={"machine": "a"}), tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    assert read_speed("a", tmp_path) is None


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    save_speed(SPEED, tmp_path / "file" / "folder")
    assert read_speed("", tmp_path / "file" / "folder") is None


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/quantkit")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder() == Path("/home/me/.cache/quantkit")


def test_the_device_is_guessed_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert likely_device(tmp_path) == "cpu"
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert likely_device(tmp_path) == "cuda"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert likely_device(tmp_path) == "cpu"


# ------------------------------------------------------------------------------------------------------------- hours


def test_a_plan_says_how_long_it_takes(v3: Forecast) -> None:
    found, timed = v3, replace(v3, duration=duration_of(v3))
    assert timed.duration is not None
    text = forecast_text(timed)
    assert "\ntakes   about " in text
    assert "on this machine (" in text
    assert "\ntakes   about " not in forecast_text(found)
    document: Any = forecast_document(timed, "r")
    parts = document["duration"]
    assert parts["seconds"] == pytest.approx(timed.duration.seconds, abs=0.1)
    assert parts["computing"] > parts["reading"] > 0
    assert sum(parts[key] for key in ("computing", "reading", "writing")) <= parts["seconds"] + 1
    assert forecast_document(found, "r")["duration"] is None


def test_a_machine_that_is_known_is_not_measured_and_torch_not_loaded(tmp_path: Path) -> None:
    found = forecast(NANO, Recipe.from_yaml("nano-demo"))
    kernels = dict.fromkeys(treatments(found.plan), KERNEL)
    disks = {disk_key(NANO, ROOT): DISK}
    known = SPEED.model_copy(update={"machine": machine_key(likely_device()), "kernels": kernels, "disks": disks})
    save_speed(known, tmp_path / "quantkit")
    code = (
        "import sys; from quantkit import plan; found = plan('examples/nano-deepseek-v3', 'nano-demo', hours=True); "
        "print(found.duration.seconds > 0, 'torch' in sys.modules)"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert ran.stdout == "True False\n"
