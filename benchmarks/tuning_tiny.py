"""GPTQ with and without tuning of whole layers on a trained model: conversions, one evaluation of all results.

    python benchmarks/tuning_tiny.py --model DIR --text DIR --only int4 [--tune '{}' --tune '{alpha: 0.5}'] [--store]

DIR of the text holds calibration/*.txt and eval/*.txt, those of the peers' comparison (benchmarks/README.md). Each
--tune is the recipe's key; differences are paired over windows against GPTQ of the same row. --aware adds rows with
output Hessians, --metric weighs the layer's error by a Fisher pass. Rows go to results/tuning_tiny.json with --store.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from awq_tiny import quantkit, record

RESULTS = Path(__file__).resolve().parent / "results" / "tuning_tiny.json"
TABLES = {"match": "role:embed|lm_head", "keep": "f32"}


def integers(experts: int, rest: int) -> dict[str, Any]:
    """Of the issue's first rows: routed experts, and all other projections."""

    def rule(match: str, bits: int) -> dict[str, Any]:
        return {"match": match, "scheme": {"kind": "int", "bits": bits, "group_size": 128}}

    rules = [rule("role:expert", experts), rule("role:attention|mlp|shared_expert", rest)]
    return {"format": "compressed-tensors", "rules": [*rules, {"match": "*", "keep": "source"}]}


def folder(scheme: dict[str, Any]) -> dict[str, Any]:
    rule = {"match": "role:expert|attention|mlp|shared_expert", "scheme": scheme}
    return {"format": "compressed-tensors", "rules": [rule, {"match": "*", "keep": "source"}]}


OUTPUTS: dict[str, dict[str, Any]] = {
    "int4": integers(4, 4),
    "int3": integers(3, 3),
    "mixed": integers(4, 8),
    "Q4_K_M": {"format": "gguf", "preset": "Q4_K_M", "rules": [TABLES]},
    "Q3_K_M": {"format": "gguf", "preset": "Q3_K_M", "rules": [TABLES]},
    "Q2_K": {"format": "gguf", "preset": "Q2_K", "rules": [TABLES]},
    "nvfp4": folder({"kind": "nvfp4"}),
    "mxfp4": folder({"kind": "mxfp4"}),
    "int2": folder({"kind": "int", "bits": 2, "group_size": 32, "symmetric": False}),
}


@dataclass(frozen=True)
class Case:
    """One conversion. ``tune``: the recipe's key, None: GPTQ alone."""

    row: str
    tune: dict[str, Any] | None
    aware: bool
    metric: bool

    @property
    def label(self) -> str:
        words = [*(["two-sided"] if self.aware else []), *(["metric"] if self.metric else [])]
        how = "" if self.tune is None else f" tuned {json.dumps(self.tune)}"
        return f"{self.row}{how}{' ' if words else ''}{' '.join(words)}"


def recipe(case: Case, arguments: argparse.Namespace, fisher: Path) -> dict[str, Any]:
    config = json.loads((arguments.model / "config.json").read_text())
    output = {"name": "out", **OUTPUTS[case.row]}
    if output["format"] != "gguf" and config.get("num_nextn_predict_layers"):
        output["rules"] = [{"match": "role:mtp", "drop": True}, *output["rules"]]
    output["method"] = {"kind": "gptq", "output_aware": case.aware}
    data = {"data": [f"{arguments.text}/calibration/*.txt"], "tokens": arguments.tokens, "sequence_length": 512}
    values: dict[str, Any] = {"version": 1, "calibration": {**data, "seed": 0}, "outputs": [output]}
    if case.tune is not None:
        values["tune"] = case.tune
    if case.aware or case.metric:
        values["sensitivity"] = str(fisher)
    return values


def convert(case: Case, arguments: argparse.Namespace, work: Path, number: int) -> tuple[Path, dict[str, Any]]:
    """Folder of the result, and what is known of the run."""
    path, out = work / f"{number}.yaml", work / f"{number}"
    path.write_text(yaml.safe_dump(recipe(case, arguments, work / "fisher"), sort_keys=False))
    start = time.monotonic()
    report = quantkit("convert", str(arguments.model), "-r", str(path), "-o", str(out))
    document = json.loads((out / "quantkit.json").read_text())
    known = {"layers_s": round(report["seconds"]["layers"], 1), "wall_s": round(time.monotonic() - start, 1)}
    return out, {**known, "tuning": document.get("tuning", {})}


def fisher_pass(arguments: argparse.Namespace, work: Path) -> None:
    words = ("--data", f"{arguments.text}/calibration/*.txt", "--tokens", str(arguments.fisher_tokens))
    quantkit("sensitivity", str(arguments.model), "-o", str(work / "fisher"), *words, "--sequence-length", "512")


def evaluate(arguments: argparse.Namespace, candidates: list[Path]) -> list[list[float]]:
    """The mean KLD of each window, for each candidate."""
    words = ["--text", f"{arguments.text}/eval/*.txt", "--context", "512", "--no-noise-floor"]
    words += ["--max-windows-per-file", str(arguments.windows_per_file)]
    found = quantkit("evaluate", str(arguments.model), *map(str, candidates), *words)
    return [candidate["result"]["windows"]["kld"] for candidate in found["candidates"]]


def scored(case: Case, known: dict[str, Any], plain: list[float], own: list[float]) -> dict[str, Any]:
    before, after = (torch.tensor(values, dtype=torch.float64) for values in (plain, own))
    change, mean, root = after - before, float(before.mean()), math.sqrt(len(own))
    return {
        "row": case.row,
        "tune": case.tune,
        "two-sided": case.aware,
        "metric": case.metric,
        "kld": round(float(after.mean()), 6),
        "kld_se": round(float(after.std()) / root, 6),
        "change": round(float(change.mean()) / mean, 4),
        "change_se": round(float(change.std()) / root / mean, 4),
        **known,
    }


def cases(row: str, arguments: argparse.Namespace) -> Iterator[Case]:
    """GPTQ, then each way of tuning; the same after two-sided rounding."""
    yield Case(row, None, False, False)
    for tune in arguments.tune:
        yield Case(row, tune, False, arguments.metric)
    if arguments.aware:
        yield Case(row, None, True, False)
        for tune in arguments.tune:
            yield Case(row, tune, True, arguments.metric)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=["int4", "int3", "mixed", "Q4_K_M", "Q3_K_M"], choices=OUTPUTS)
    parser.add_argument("--tune", type=yaml.safe_load, action="append", help="the recipe's key; default: {}")
    parser.add_argument("--aware", action="store_true", help="also with output_aware")
    parser.add_argument("--metric", action="store_true", help="tune with the metric of a Fisher pass")
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--fisher-tokens", type=int, default=32_768)
    parser.add_argument("--windows-per-file", type=int, default=8)
    parser.add_argument("--store", action="store_true")
    arguments = parser.parse_args()
    arguments.model, arguments.text = arguments.model.resolve(), arguments.text.resolve()
    arguments.tune = arguments.tune or [{}]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        if arguments.aware or arguments.metric:
            fisher_pass(arguments, Path(work))
        for row in arguments.only:
            rows += measure(row, arguments, Path(work))
    if arguments.store:
        store(rows, arguments)


def measure(row: str, arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    wanted = list(cases(row, arguments))
    made = [(case, *convert(case, arguments, work, number)) for number, case in enumerate(wanted)]
    klds = evaluate(arguments, [out for _, out, _ in made])
    rows = [scored(case, known, klds[0], own) for (case, _, known), own in zip(made, klds, strict=True)]
    for (case, out, _), found in zip(made, rows, strict=True):
        short = {key: value for key, value in found.items() if key != "tuning"}
        print(case.label, json.dumps(short), flush=True)
        subprocess.run(["rm", "-r", str(out)], check=True)
    return rows


def store(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Put rows into the file, in place of older ones of the same model, row and settings."""
    known: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    common = {"model": arguments.model.name, "tokens": arguments.tokens}
    rows = [{key: value for key, value in {**row, **common}.items() if key != "tuning"} for row in rows]
    keys = ("model", "tokens", "row", "tune", "two-sided", "metric")
    new = [[row[key] for key in keys] for row in rows]
    kept = [row for row in known if [row[key] for key in keys] not in new]
    document = {**record(), "fisher_tokens": arguments.fisher_tokens, "rows": [*kept, *rows]}
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
