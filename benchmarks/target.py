"""Types chosen for a size, on the peers' model: what was expected and what came out, at the bytes of hand-made recipes.

    python benchmarks/target.py --model DIR --text DIR --fisher FELT [--tokens 131072] [--cases q4 q3 q2 mix]
        [--switches none output_aware ...] [--store results/target.json]      # each a conversion; rows by case
    python benchmarks/target.py --model DIR --text DIR --fisher FELT --fit    # the two coefficients of expected_kl

The cases take the bytes of Q4_K_M, Q3_K_M and Q2_K (embeddings and head in float32, as llama-quantize's files of
results/gguf_tiny.json have them), and those of int4 experts with int8 for the rest. Of each case the types are chosen
once; every set of --switches (those of switches.py) is a conversion by them, judged and stored before the next, against
"none". --fit compares second-order losses with outputs whose KLD other benchmarks have measured.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from judged import add_places, calibration, change, facts, fisher_pass, klds, mean_and_error, store
from switches import SETS

import quantkit
from quantkit.documents.sensitivity import read_sensitivity
from quantkit.plan.allocation.expected import expected_kl
from quantkit.plan.headers import read_headers
from quantkit.plan.plan import OutputPlan, make_plan
from quantkit.plan.recipe import Recipe
from quantkit.quantizers import Gptq

RESULTS = Path(__file__).resolve().parent / "results"
KEYS = ("model", "case", "switches", "tokens", "device")
NONE = "none"
TABLES = {"match": "role:embed|lm_head", "keep": "f32"}
REST = {"match": "*", "keep": "source"}


def gguf(**more: Any) -> dict[str, Any]:
    return {"name": "gguf", "format": "gguf", **more}


def integers(experts: int, rest: int) -> dict[str, Any]:
    def rule(match: str, bits: int) -> dict[str, Any]:
        return {"match": match, "scheme": {"kind": "int", "bits": bits, "group_size": 128}}

    rules = [rule("role:expert", experts), rule("role:attention|mlp|shared_expert", rest), REST]
    return {"name": "folder", "format": "compressed-tensors", "rules": rules}


HAND: Mapping[str, tuple[dict[str, Any], Sequence[dict[str, Any]]]] = {
    "q4": (gguf(preset="Q4_K_M", rules=[TABLES]), [TABLES]),
    "q3": (gguf(preset="Q3_K_M", rules=[TABLES]), [TABLES]),
    "q2": (gguf(preset="Q2_K", rules=[TABLES]), [TABLES]),
    "mix": (integers(4, 8), []),
}
"""Case -> the recipe whose bytes are the limit, and the rules that stand beside the target."""
MIXED = [{"match": f"role:{role}", "scheme": kind} for role, kind in
         (("expert", "Q3_K"), ("attention", "Q6_K"), ("mlp", "Q5_K"), ("shared_expert", "Q4_K"))]  # fmt: skip
FIT: Mapping[str, tuple[dict[str, Any], str, str, str]] = {
    "Q4_K_M": (gguf(preset="Q4_K_M", rules=[TABLES]), "gguf_tiny", "Q4_K_M", "Q4_K_M, 131,072"),
    "Q3_K_M": (gguf(preset="Q3_K_M", rules=[TABLES]), "gguf_tiny", "Q3_K_M", "Q3_K_M, 131,072"),
    "IQ4_XS": (gguf(preset="IQ4_XS", rules=[TABLES]), "gguf_tiny", "IQ4_XS", "IQ4_XS, 131,072"),
    "Q2_K": (gguf(preset="Q2_K", rules=[TABLES]), "gguf_tiny", "Q2_K", "Q2_K, 131,072"),
    "IQ4_XS, rest Q8_0": (
        gguf(rules=[TABLES, {"match": "role:expert", "scheme": "IQ4_XS"},
                    {"match": "role:attention|mlp|shared_expert", "scheme": "Q8_0"}, REST]),
        "gguf_tiny", "Q4_K_M", "Q4_K_M-bytes",
    ),
    "Q3_K, rest wider": (
        gguf(rules=[TABLES, {"match": "*.q_b_proj.weight", "scheme": "Q8_0"},
                    {"match": "*.kv_b_proj.weight", "scheme": "Q8_0"}, *MIXED, REST]),
        "gguf_tiny", "Q3_K_M", "Q3_K_M-bytes",
    ),
    "int4": (integers(4, 4), "peers_tiny", "int4", ""),
    "int3": (integers(3, 3), "peers_tiny", "int3", ""),
    "int4, rest int8": (integers(4, 8), "peers_tiny", "mixed", ""),
}  # fmt: skip
"""Output -> its recipe, and where its KLD was measured: file, scheme, beginning of the settings."""


def recipe(output: Mapping[str, Any], arguments: argparse.Namespace) -> Recipe:
    values = {
        "calibration": calibration(arguments.text, arguments.tokens),
        "sensitivity": str(arguments.fisher.resolve()),
    }
    return Recipe.from_dict({"version": 1, **values, "outputs": [output]})


def planned(made: Recipe, model: Path) -> OutputPlan:
    headers = read_headers(model)
    return make_plan(made, headers.arch, headers.infos, headers.stored).outputs[0]


def file_bytes(made: Recipe, model: Path) -> int:
    found = planned(made, model)
    return found.target.file_bytes(model, found.planned)


def layer_losses(made: Recipe, arguments: argparse.Namespace) -> list[float]:
    """Second-order loss of each layer of a plan."""
    losses = read_sensitivity(arguments.fisher).losses or {}
    layers: dict[int | None, float] = defaultdict(float)
    for name, decision in planned(made, arguments.model).decisions.items():
        if decision.scheme is not None and name in losses:
            layers[decision.spec.layer] += losses[name][decision.scheme.label]
    return list(layers.values())


def chosen(case: str, arguments: argparse.Namespace) -> tuple[Recipe, dict[str, Any]]:
    """The types for a case's bytes, as rules, and what is known of them."""
    hand, rules = HAND[case]
    limit = file_bytes(recipe(hand, arguments), arguments.model)
    output = {"name": hand["name"], "format": hand["format"], "target": {"size": limit}, "rules": list(rules)}
    made = quantkit.choose_types(arguments.model, recipe(output, arguments))
    layers = layer_losses(made, arguments)
    return made, {
        "model": arguments.model.resolve().name, "case": case, "tokens": arguments.tokens,
        "limit": limit, "file_bytes": file_bytes(made, arguments.model),
        "layers": layers, "second_order": sum(layers), "expected": expected_kl(layers),
    }  # fmt: skip


def switched(made: Recipe, name: str) -> Recipe:
    """The recipe with a set of switches, for all linears whose types were chosen."""
    if name == NONE:
        return made
    method = Gptq.model_validate({"kind": "gptq", **SETS[name].method})
    outputs = [output.model_copy(update={"method": method}) for output in made.outputs]
    values = made.model_copy(update={"outputs": tuple(outputs)}).model_dump(mode="json", exclude_none=True)
    return Recipe.from_dict({**values, **SETS[name].top}, made.folder)


def run(made: Recipe, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Convert and judge."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "out"
        quantkit.convert(arguments.model, switched(made, name), out)
        wall = round(time.monotonic() - start, 1)
        windows = klds(arguments.model, out, arguments.text, arguments.windows_per_file)
        shutil.rmtree(out)
    kld, error = mean_and_error(windows)
    return {"switches": name, "kld": kld, "kld_se": error, "wall_s": wall, "kld_windows": windows, **facts()}


def measure(case: str, arguments: argparse.Namespace) -> None:
    """A case under each set of switches: print and store each row."""
    made, known = chosen(case, arguments)
    plain: list[float] = []
    for name in arguments.switches:
        row = {**known, **run(made, name, arguments)}
        plain = row["kld_windows"] if name == NONE else plain
        if plain and name != NONE:
            row["change"], row["change_se"] = change(plain, row["kld_windows"])
        moved = f", {100 * row['change']:+.2f} ± {100 * row['change_se']:.2f} %" if "change" in row else ""
        numbers = f"{row['kld']:.5f} ± {row['kld_se']:.5f}{moved}, expected {row['expected']:.5f}"
        print(f"{row['model']} {case} {name}: {numbers}, {row['file_bytes']:,} of {row['limit']:,} bytes", flush=True)
        store(arguments.store, row, KEYS)


def fit(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Second-order losses beside KLDs that other benchmarks measured of quantkit's GPTQ, 131,072 tokens."""
    rows: list[dict[str, Any]] = []
    for name, (output, file, scheme, settings) in FIT.items():
        found = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))
        measured = [
            row["kld"]
            for row in found["rows"]
            if (row["name"], row["scheme"]) == ("quantkit", scheme) and row["settings"].startswith(settings)
        ]
        layers = layer_losses(recipe(output, arguments), arguments)
        row = {"output": name, "second_order": sum(layers), "expected": expected_kl(layers), "kld": measured[0]}
        rows.append({**row, "layers": layers})
    return rows


def coefficients(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """ROUNDING and FLIPS: least squares of expected / measured - 1."""
    features = [[sum(row["layers"]), sum(map(math.sqrt, row["layers"]))] for row in rows]
    scaled = np.array(features) / np.array([[row["kld"]] for row in rows])
    return [float(value) for value in np.linalg.lstsq(scaled, np.ones(len(rows)), rcond=None)[0]]


def fit_to(file: Path, arguments: argparse.Namespace) -> None:
    """Put the fit into the file, over its plain rows and the hand-made outputs."""
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    data["fitted"] = fit(arguments)
    plain = [row for row in data["rows"] if row.get("switches", NONE) == NONE]
    longest = {row["case"]: row for row in sorted(plain, key=lambda row: row["tokens"])}
    data["coefficients"] = coefficients([*data["fitted"], *longest.values()])
    data["coefficients_without_rows"] = coefficients(data["fitted"])
    print(data["coefficients"], data["coefficients_without_rows"])
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_places(parser)
    parser.add_argument("--cases", nargs="*", default=list(HAND), choices=list(HAND))
    parser.add_argument("--switches", nargs="+", default=[NONE], choices=[NONE, *SETS])
    parser.add_argument("--store", type=Path, help="file of rows")
    parser.add_argument("--fit", action="store_true", help="into --store, else results/target.json")
    arguments = parser.parse_args()
    print(fisher_pass(arguments.fisher, arguments.model, arguments.text, arguments.fisher_tokens), flush=True)
    if arguments.fit:
        fit_to(arguments.store or RESULTS / "target.json", arguments)
        return
    for case in arguments.cases:
        measure(case, arguments)


if __name__ == "__main__":
    main()
