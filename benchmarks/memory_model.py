"""Does `convert` take the memory that `plan` says? Conversions of small models in processes of their own.

    python benchmarks/memory_model.py [--models DIR ...] [--device cuda] [--recipes WORD]

Every case is a model, a recipe and a memory budget: the shipped nano model, and with --models larger ones. The measured
peak must lie within 0.75 and 1.05 of the plan's figure: a plan that says too little breaks a budget, one that says
much too much wastes a machine. On a GPU the figure is what torch has allocated there at most, and RAM is reported
without a bound. The measuring process stays free of torch: a child's peak begins with its parent's.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import synthetic

from quantkit import plan
from quantkit.plan.forecast import Forecast

ROOT = synthetic.ROOT
NANO = ROOT / "examples" / "nano-deepseek-v3"
LEAST, MOST = 0.75, 1.05
"""Measured peak divided by the plan's."""
RTN = """\
version: 1
outputs:
  - name: w4a16
    format: compressed-tensors
    rules:
      - match: "role:attention|mlp|shared_expert|expert"
        scheme: {kind: int, bits: 4, group_size: 128}
        method: {kind: rtn}
      - {match: "*", keep: source}
"""
GGUF = """\
version: 1
calibration: {data: [builtin:mixed], tokens: 32768, sequence_length: 256}
outputs:
  - {name: Q4_K_M, format: gguf, preset: Q4_K_M}
"""
BUDGETS = ("", "256MiB", "1GiB")


def recipes(folder: Path) -> list[Path]:
    """Two that the repository has, one without calibration text, and a GGUF preset."""
    written: list[Path] = []
    for name, text in (("rtn", RTN), ("q4_k_m", GGUF)):
        path = folder / f"{name}.yaml"
        path.write_text(text)
        written.append(path)
    return [ROOT / "recipes" / "nano-demo.yaml", ROOT / "tests" / "baselines" / "nano.yaml", *written]


def measure(source: Path, recipe: Path, budget: str, device: str, folder: Path) -> dict[str, Any]:
    """One conversion beside its plan."""
    options = ["--memory-budget", budget] if budget else []
    forecast = plan(source, recipe, memory_budget=budget or None)
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    run = synthetic.convert(source, recipe, out, "--device", device, *options)
    report = run["report"]
    row = {
        "model": source.name,
        "recipe": recipe.name,
        "budget": budget or "default",
        "seconds": run["seconds"],
        "least_ram_bytes": forecast.needs.working_bytes,
        "measured_ram_bytes": report["peak_rss_bytes"],
        **(_on_gpu(forecast, report) if device == "cuda" else _on_cpu(forecast, report)),
    }
    row["ratio"] = round(row["measured_bytes"] / row["planned_bytes"], 3)
    return row


def _on_cpu(forecast: Forecast, report: dict[str, Any]) -> dict[str, Any]:
    assert forecast.expected is not None, "plan refuses a budget that is too small"
    share = forecast.expected.share
    return {
        "experts_at_once": share.experts_at_once,
        "planned_bytes": forecast.expected.ram_bytes,
        "measured_bytes": report["peak_rss_bytes"],
    }


def _on_gpu(forecast: Forecast, report: dict[str, Any]) -> dict[str, Any]:
    assert forecast.on_gpu is not None, "plan refuses a budget that is too small"
    return {
        "experts_at_once": forecast.on_gpu.share.experts_at_once,
        "planned_ram_bytes": forecast.on_gpu.ram_bytes,
        "planned_bytes": forecast.on_gpu.gpu_bytes,
        "measured_bytes": report["peak_gpu_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="more models, for the same recipes")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--recipes", default="", help="only those whose name holds this word")
    parser.add_argument("--budgets", nargs="*", default=BUDGETS)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="memory-model-"))
    rows: list[dict[str, Any]] = []
    cases = itertools.product(arguments.budgets, (NANO, *arguments.models), recipes(folder))
    for budget, source, recipe in cases:
        if arguments.recipes in recipe.name:
            rows.append(measure(source, recipe, budget, arguments.device, folder))
            print(_line(rows[-1]), flush=True)
            write(rows, arguments.device)
    shutil.rmtree(folder)
    outside = [row for row in rows if not LEAST <= row["ratio"] <= MOST]
    print(f"{len(rows) - len(outside)} of {len(rows)} within {LEAST} and {MOST} of the plan")
    raise SystemExit(bool(outside))


def write(rows: list[dict[str, Any]], device: str) -> None:
    """benchmarks/results/memory_model.json, or memory_model_cuda.json."""
    result = {
        "what": f"peak memory of convert beside the plan's figure, on {device}",
        **synthetic.machine(),
        "bounds": [LEAST, MOST],
        "rows": rows,
    }
    synthetic.write_result("memory_model" if device == "cpu" else f"memory_model_{device}", result)


def _line(row: dict[str, Any]) -> str:
    planned, measured = (f"{row[key] / 1e6:7,.0f} MB" for key in ("planned_bytes", "measured_bytes"))
    case = f"{row['model']:22} {row['recipe']:15} {row['budget']:8}"
    return f"{case} {row['experts_at_once']:3} experts  plan {planned}  measured {measured}  ratio {row['ratio']:.3f}"


if __name__ == "__main__":
    main()
