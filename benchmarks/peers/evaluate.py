"""Decoded weights -> one row of benchmarks/results/peers_tiny.json.

    python benchmarks/peers/evaluate.py --decoded DIR --name quantkit --scheme int4 [--settings TEXT] [--seconds S]
    python benchmarks/peers/evaluate.py --rtn int4            # the data-free floor
    python benchmarks/peers/evaluate.py --self-check          # RTN int4 and int3 must give the published figures

DIR holds *.safetensors with float weights (any float dtype) under the official checkpoint names; a tensor that is not
there is taken from the reference, but every projection must be there. A row with the same name, scheme and settings is
replaced. Run it with quantkit's own environment.
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from protocol import (
    Divergence,
    bits_per_weight,
    compare,
    is_projection,
    load_weights,
    model_dir,
    off_grid,
    read_run_note,
    rtn,
)
from torch import Tensor

RESULTS = Path(__file__).resolve().parents[1] / "results" / "peers_tiny.json"
WHAT = "tiny-deepseek-v3, 88 held-out windows of 512 tokens, KLD in nats against the BF16 weights, float32 arithmetic"
PUBLISHED = {"int4": 0.07509, "int3": 0.42365}
"""Mean KLD of plain rounding, measured before by another script: it comes out only if windows and arithmetic match."""


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def evaluation_record() -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "device": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def row_of(
    weights: Mapping[str, Tensor], reference: Mapping[str, Tensor], scheme: str, note: dict[str, Any]
) -> dict[str, Any]:
    """One row: who, which settings, how many bits, how far from the reference, how long it took."""
    faults = off_grid(weights, reference, scheme)
    if faults:
        raise SystemExit(f"{note['name']} {scheme}: {len(faults)} tensors break the rules, first: {faults[0]}")
    started = time.perf_counter()
    result: Divergence = compare(weights, reference)
    row = {"scheme": scheme, "bpw": round(bits_per_weight(reference, scheme), 4), **note, **asdict(result)}
    row["evaluation"] = {**evaluation_record(), "seconds": round(time.perf_counter() - started, 1)}
    return row


def evaluate_decoded(
    state_dict_path: Path, name: str, scheme: str, note: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Row of a folder of decoded weights; run.json in it and then `note` fill settings, seconds and versions."""
    reference = load_weights(model_dir())
    decoded = load_weights(state_dict_path)
    missing = [tensor for tensor in reference if is_projection(tensor) and tensor not in decoded]
    unknown = [tensor for tensor in decoded if tensor not in reference]
    if missing or unknown:
        raise SystemExit(
            f"{state_dict_path}: missing {missing[:3]} ({len(missing)}), unknown {unknown[:3]} ({len(unknown)})"
        )
    return row_of(
        {**reference, **decoded}, reference, scheme, {"name": name, **read_run_note(state_dict_path), **(note or {})}
    )


def store(row: dict[str, Any]) -> None:
    """Put the row into the results file, in place of an older one of the same name, scheme and settings."""
    with RESULTS.with_suffix(".lock").open("w") as lock:  # two evaluations may end at the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
        key = ("name", "scheme", "settings")
        rows = [old for old in rows if any(old.get(k) != row.get(k) for k in key)] + [row]
        lines = ",\n".join(json.dumps(r) for r in rows)
        partial = RESULTS.with_suffix(".partial")
        partial.write_text(f'{{"what": {json.dumps(WHAT)},\n"rows": [\n{lines}\n]}}\n')
        partial.rename(RESULTS)


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['name']} {row['scheme']} [{row.get('settings', '')}] {row['bpw']:.3f} bpw: "
        f"KLD {row['kld']:.5f} ± {row['kld_se']:.5f}, median {row['kld_median']:.4f}, "
        f"ppl {row['ppl']:.3f} (reference {row['ppl_reference']:.3f}), top-1 {row['top1']:.2f} %"
    )


def rtn_row(scheme: str) -> dict[str, Any]:
    reference = load_weights(model_dir())
    return row_of(
        rtn(reference, scheme), reference, scheme, {"name": "RTN", "settings": "max/(2^(b-1)-1), bf16 scales"}
    )


def self_check() -> None:
    for scheme, published in PUBLISHED.items():
        row = rtn_row(scheme)
        show(row)
        if abs(row["kld"] - published) > 1e-4:
            raise SystemExit(f"RTN {scheme}: KLD {row['kld']:.5f}, the published figure is {published}")
        store(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoded", type=Path, help="folder of safetensors with decoded float weights")
    parser.add_argument("--name", help="who made them")
    parser.add_argument(
        "--scheme", choices=["int3", "int4", "int8", "mixed"], help="mixed: routed experts 4, the rest 8"
    )
    parser.add_argument("--settings", help="what was chosen, in words")
    parser.add_argument("--bpw", type=float, help="bits per weight, if not 16-bit scales for each 128 inputs")
    parser.add_argument("--seconds", type=float, help="wall seconds of the quantisation")
    parser.add_argument("--rtn", choices=["int3", "int4", "int8", "mixed"])
    parser.add_argument("--self-check", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="print the row, do not store it")
    args = parser.parse_args()
    if args.self_check:
        self_check()
        return
    if args.rtn:
        row = rtn_row(args.rtn)
    elif args.decoded and args.name and args.scheme:
        given = {"settings": args.settings, "bpw": args.bpw, "seconds": args.seconds}
        row = evaluate_decoded(args.decoded, args.name, args.scheme, {k: v for k, v in given.items() if v is not None})
    else:
        parser.error("--decoded, --name and --scheme go together; or --rtn, or --self-check")
    show(row)
    if not args.dry_run:
        store(row)


if __name__ == "__main__":
    main()
