"""Switches of GPTQ that are off by default, each alone and all together, on a trained model: paired KLDs.

    python benchmarks/switches.py --model DIR --text DIR --fisher FELT int4-g128 int3-g128 [--store FILE]
        [--sets gptq router row_gains output_aware all] [--tokens 131072] [--windows-per-file 8]

Every linear in one scheme, router, norms, embeddings and head as the source has them. TEXT holds calibration/*.txt and
eval/*.txt; the Fisher pass is made in FELT if it isn't there. Each conversion is judged and printed before the next
one, against "gptq" of the same scheme in this call. --store (results/switches.json) takes each row at once.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from judged import add_places, calibration, change, facts, fisher_pass, klds, mean_and_error, store

import quantkit

KEYS = ("model", "scheme", "switches", "tokens", "device")


@dataclass(frozen=True)
class Switches:
    """What a recipe says beside the defaults: keys at its top, and options of gptq."""

    top: Mapping[str, Any]
    method: Mapping[str, Any]


ROUTER = {"router": "least_squares"}
SETS = {
    "gptq": Switches({}, {}),
    "router": Switches(ROUTER, {}),
    "row_gains": Switches({}, {"row_gains": True}),
    "output_aware": Switches({}, {"output_aware": True}),
    "all": Switches(ROUTER, {"row_gains": True, "output_aware": True}),
}


def scheme_of(name: str) -> dict[str, Any]:
    """ "int3-g128-asym" -> the scheme."""
    bits, group, *rest = name.split("-")
    return {"kind": "int", "bits": int(bits[3:]), "group_size": int(group[1:]), "symmetric": rest != ["asym"]}


def recipe(model: Path, scheme: str, switches: Switches, arguments: argparse.Namespace) -> quantkit.Recipe:
    mtp = bool(json.loads((model / "config.json").read_text(encoding="utf-8")).get("num_nextn_predict_layers"))
    method = {"kind": "gptq", **switches.method}
    rules: list[dict[str, Any]] = [
        {"match": "role:expert|attention|mlp|shared_expert", "scheme": scheme_of(scheme), "method": method},
        *([{"match": "role:mtp", "drop": True}] if mtp else []),
        {"match": "*", "keep": "source"},
    ]
    top = {**switches.top, "calibration": calibration(arguments.text, arguments.tokens)}
    if switches.method.get("output_aware"):
        top["sensitivity"] = str(arguments.fisher.resolve())
    outputs = [{"name": "out", "format": "compressed-tensors", "rules": rules}]
    return quantkit.Recipe.from_dict({"version": 1, **top, "outputs": outputs})


def measured(scheme: str, name: str, arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Convert and judge, one row."""
    out, start = work / name, time.monotonic()
    made = recipe(arguments.model, scheme, SETS[name], arguments)
    report = quantkit.convert(arguments.model, made, out)
    wall = time.monotonic() - start
    windows = klds(arguments.model, out, arguments.text, arguments.windows_per_file)
    shutil.rmtree(out)
    kld, error = mean_and_error(windows)
    return {
        "model": arguments.model.resolve().name, "scheme": scheme, "switches": name, "tokens": arguments.tokens,
        "layers_s": round(report.seconds["layers"], 1), "wall_s": round(wall, 1),
        "kld": kld, "kld_se": error, "kld_windows": windows, **facts(),
    }  # fmt: skip


def shown(row: Mapping[str, Any]) -> str:
    moved = f", {100 * row['change']:+.2f} ± {100 * row['change_se']:.2f} %" if "change" in row else ""
    numbers = f"{row['kld']:.5f} ± {row['kld_se']:.5f}{moved}"
    return (
        f"{row['model']} {row['scheme']} {row['switches']}: {numbers} ({row['layers_s']} s layers, {row['wall_s']} s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_places(parser)
    parser.add_argument("schemes", nargs="+", help="int4-g128, int3-g128, ...")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--store", type=Path, help="file of rows")
    arguments = parser.parse_args()
    felt: dict[str, Any] = {}
    if any(SETS[name].method.get("output_aware") for name in arguments.sets):
        felt = fisher_pass(arguments.fisher, arguments.model, arguments.text, arguments.fisher_tokens)
        print(felt, flush=True)
    with tempfile.TemporaryDirectory() as work:
        for scheme in arguments.schemes:
            plain: list[float] = []
            for name in arguments.sets:
                row = {**measured(scheme, name, arguments, Path(work)), **felt}
                plain = row["kld_windows"] if name == "gptq" else plain
                if plain and name != "gptq":
                    row["change"], row["change_se"] = change(plain, row["kld_windows"])
                print(shown(row), flush=True)
                store(arguments.store, row, KEYS)


if __name__ == "__main__":
    main()
