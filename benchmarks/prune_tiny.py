"""Experts that are pruned beside fewer bits, on a trained model: conversions in about the same bytes, one evaluation.

    python benchmarks/prune_tiny.py MODEL [--tokens 8192] [--windows-per-file 4] [--store]

MODEL is a folder of a model whose experts come in groups of six; the text is that of the peers' comparison
(benchmarks/README.md). All are GPTQ in groups of 128, everything but the experts int4. Differences are paired over
windows. Rows go to results/prune_tiny.json with --store.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from awq_tiny import quantkit, record, scheme_of
from protocol import shared_dir

CODE = "python.txt"
RESULTS = Path(__file__).resolve().parent / "results" / "prune_tiny.json"


@dataclass(frozen=True)
class Plan:
    """Bits of the experts, and of those of the last layer; ``pruned``: experts that go of each group; ``scored_on``:
    the only file of text that scores experts, "" for all of the calibration text."""

    name: str
    bits: int = 4
    last: int = 4
    pruned: int = 0
    scored_on: str = ""
    beside: str = ""
    """The plan with about as many bytes."""


PLANS = (
    Plan("all experts, int4"),
    Plan("1/6 pruned, int4", pruned=1, beside="int3, last layer int4"),
    Plan("int3, last layer int4", bits=3),
    Plan("1/3 pruned, int4", pruned=2, beside="int3, last layer int2"),
    Plan("int3, last layer int2", bits=3, last=2),
    Plan(f"1/6 pruned by {CODE} alone, int4", pruned=1, scored_on=CODE, beside="1/6 pruned, int4"),
)


def document(data: str, tokens: int, rules: list[dict[str, Any]], prune: dict[str, Any] | None) -> dict[str, Any]:
    """A recipe."""
    text = shared_dir() / "models" / "text" / "calibration"
    found: dict[str, Any] = {
        "version": 1,
        "calibration": {"data": [f"{text}/{data}"], "tokens": tokens, "sequence_length": 512},
        "outputs": [{"name": "out", "format": "compressed-tensors", "rules": rules}],
    }
    return found if prune is None else {**found, "prune": prune}


def rules_of(plan: Plan, last: int) -> list[dict[str, Any]]:
    return [
        {"match": f"*.layers.{last}.mlp.experts.*", "scheme": scheme_of(f"int{plan.last}-g128")},
        {"match": "role:expert", "scheme": scheme_of(f"int{plan.bits}-g128")},
        {"match": "role:attention|mlp|shared_expert", "scheme": scheme_of("int4-g128")},
        {"match": "*", "keep": "source"},
    ]


def run(model: Path, recipe: dict[str, Any], out: Path) -> dict[str, Any]:
    """Convert -> quantkit.json."""
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    quantkit("convert", str(model), "-r", str(path), "-o", str(out))
    return json.loads((out / "quantkit.json").read_text())


def converted(plan: Plan, model: Path, tokens: int, work: Path) -> tuple[Path, dict[str, Any]]:
    """Folder of the result, and what is known of it."""
    out = work / str(PLANS.index(plan))
    config = json.loads((model / "config.json").read_text())
    prune: dict[str, Any] | None = {"experts": plan.pruned * config["n_group"]} if plan.pruned else None
    if prune is not None and plan.scored_on:
        scores = work / f"{out.name}-scores"
        run(model, document(plan.scored_on, tokens, [{"match": "*", "keep": "source"}], prune), scores)
        prune = {**prune, "scores": str(scores)}
    made = run(model, document("*.txt", tokens, rules_of(plan, config["num_hidden_layers"] - 1), prune), out)
    experts = sum(role["nbytes"] for role in made["contents"] if role["role"] == "expert")
    return out, {"name": plan.name, "tokens": tokens, "bytes of experts": experts}


def evaluated(model: Path, candidates: list[Path], per_file: int) -> list[dict[str, list[float]]]:
    """The windows' mean KLD of each candidate: of all files of text, and of `CODE` alone."""
    folder = shared_dir() / "models" / "text" / "eval"
    found: list[dict[str, list[float]]] = [{} for _ in candidates]
    for what, files in (("all", "*.txt"), (CODE, CODE)):
        words = ["--text", f"{folder}/{files}", "--context", "512", "--max-windows-per-file", str(per_file)]
        scores = quantkit("evaluate", str(model), *map(str, candidates), *words, "--no-noise-floor")
        for own, candidate in zip(found, scores["candidates"], strict=True):
            own[what] = candidate["result"]["windows"]["kld"]
    return found


def mean(values: torch.Tensor) -> tuple[float, float]:
    """Mean, and its standard error."""
    return round(float(values.mean()), 6), round(float(values.std()) / math.sqrt(len(values)), 6)


def scored(rows: list[dict[str, Any]], klds: list[dict[str, list[float]]]) -> list[dict[str, Any]]:
    """The rows with their scores, and those that stand beside another, paired over windows."""
    by_name = {
        row["name"]: {what: torch.tensor(values, dtype=torch.float64) for what, values in own.items()}
        for row, own in zip(rows, klds, strict=True)
    }
    done: list[dict[str, Any]] = []
    for row, plan in zip(rows, PLANS, strict=True):
        own, found = by_name[plan.name], dict(row)
        for what, values in own.items():
            found[f"kld, {what}"], found[f"kld_se, {what}"] = mean(values)
            if plan.beside:
                more = mean(values - by_name[plan.beside][what])
                found |= {"beside": plan.beside, f"more, {what}": more[0], f"more_se, {what}": more[1]}
        done.append(found)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--windows-per-file", type=int, default=4)
    parser.add_argument("--store", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        made = [converted(plan, arguments.model, arguments.tokens, Path(work)) for plan in PLANS]
        klds = evaluated(arguments.model, [folder for folder, _ in made], arguments.windows_per_file)
    rows = scored([row for _, row in made], klds)
    sizes = {"model": arguments.model.name, "windows": {what: len(own) for what, own in klds[0].items()}}
    text = json.dumps({**record(), **sizes, "rows": rows}, indent=1) + "\n"
    print(text)
    if arguments.store:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
