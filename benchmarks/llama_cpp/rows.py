"""GGUF files of tiny-deepseek-v3 -> rows of benchmarks/results/gguf_tiny.json, and the table of all rows.

    python benchmarks/llama_cpp/rows.py FILE.gguf --name llama-quantize --scheme Q4_K_M [--settings TEXT]
        [--seconds S] [--own] [--dry-run]
    python benchmarks/llama_cpp/rows.py --table [--against NAME]

The evaluator of the peers (peers/protocol.py: 88 held-out windows of 512 tokens, float32, KLD against the BF16
weights) on the weights that gguf-py decodes; it shares no code with quantkit, and is the same whoever wrote the file.
--own asks quantkit's evaluator too, which must agree.

bpw is of what every scheme quantises (attention, MLP, experts); bytes are those of all tensors.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "peers")]

from evaluate import evaluation_record  # noqa: E402  (its folder is no package)
from protocol import compare, eval_windows, load_weights, model_dir  # noqa: E402

from tests.oracles.gguf_reader import read_types, read_weights  # noqa: E402

RESULTS = HERE.parent / "results"
WHAT = "tiny-deepseek-v3 as GGUF, 88 held-out windows of 512 tokens, KLD in nats against the BF16 weights, float32"
EXACT = ("token_embd", "output", "output_norm", "attn_norm", "ffn_norm", "attn_q_a_norm", "attn_kv_a_norm")
EXACT += ("ffn_gate_inp", "exp_probs_b", "k_norm")
"""What is no projection, by the last part of its name but one."""
HEAD = ["written by", "settings", "bpw", "bytes", "KLD ± SE", "median", "ppl", "top-1 %", "CPU s"]

Row = dict[str, Any]


def storage(path: Path) -> dict[str, Any]:
    """Bits per weight of the projections, bytes of them and of all tensors, share of weights by type."""
    weights: dict[str, int] = {}
    of_projections, of_all = 0, 0
    for name, (kind, shape, nbytes) in read_types(path).items():
        of_all += nbytes
        if name.split(".")[-2] not in EXACT:
            weights[kind] = weights.get(kind, 0) + math.prod(shape)
            of_projections += nbytes
    total = sum(weights.values())
    return {
        "bpw": round(8 * of_projections / total, 4),
        "bytes": {"projections": of_projections, "all": of_all},
        "types_percent": {kind: round(100 * n / total, 2) for kind, n in sorted(weights.items())},
    }


def row_of(path: Path, note: Row, *, own: bool) -> Row:
    """The row of a file."""
    return row_of_weights(path, read_weights(path), note, own=own)


def row_of_weights(path: Path, decoded: Mapping[str, Tensor], note: Row, *, own: bool = False) -> Row:
    """The row of decoded weights whose types are those of the file ``path``."""
    reference = load_weights(model_dir())
    if reference.keys() != decoded.keys():
        raise SystemExit(f"{path}: not the same weights: {sorted(reference.keys() ^ decoded.keys())[:3]}")
    start = time.perf_counter()
    result = compare(decoded, reference)
    row = {**note, **storage(path), **asdict(result)}
    row["evaluation"] = {**evaluation_record(), "seconds": round(time.perf_counter() - start, 1)}
    if own:
        row["own_evaluation"] = own_kld(decoded, reference)
        if abs(row["own_evaluation"] - row["kld"]) > 1e-4:
            raise SystemExit(f"{path}: quantkit finds a KLD of {row['own_evaluation']:.5f}, not {row['kld']:.5f}")
    return row


def own_kld(decoded: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """Mean KLD by quantkit.evaluate on the same windows."""
    from quantkit.arch import arch_of
    from quantkit.calibrate.hidden_states import MemoryRows
    from quantkit.evaluate.compare import Model
    from quantkit.evaluate.compare import compare as compare_streamed

    arch = arch_of(json.loads((model_dir() / "config.json").read_text(encoding="utf-8")))

    def model(weights: Mapping[str, Tensor]) -> Model:
        return Model(
            weights=weights.__getitem__,
            embed_rows=lambda ids: weights[arch.embed][ids],
            head_rows=lambda first, stop: weights[arch.lm_head][first:stop],
        )

    windows, _ = eval_windows()
    return float(compare_streamed(arch, model(reference), model(decoded), windows, MemoryRows).kld.mean())


def read_rows(results: Path) -> list[Row]:
    return json.loads(results.read_text(encoding="utf-8"))["rows"] if results.exists() else []


def store(row: Row, results: Path) -> None:
    """Put the row into the results, in place of an older one of the same name, scheme and settings."""
    key = ("name", "scheme", "settings")
    rows = [old for old in read_rows(results) if any(old.get(k) != row.get(k) for k in key)] + [row]
    lines = ",\n".join(json.dumps(r) for r in rows)
    results.write_text(f'{{"what": {json.dumps(WHAT)},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")


def cells(row: Row) -> list[str]:
    seconds = f"{row['seconds']:.1f}" if row.get("seconds") is not None else ""
    quality = [f"{row['kld']:.5f} ± {row['kld_se']:.5f}", f"{row['kld_median']:.4f}", f"{row['ppl']:.3f}"]
    stored = [f"{row['bpw']:.3f}", f"{row['bytes']['all']:,}"]
    return [row["name"], row.get("settings", ""), *stored, *quality, f"{row['top1']:.2f}", seconds]


def paired(row: Row, other: Row) -> str:
    """Mean difference of the KLD to another row with its standard error over the windows."""
    moved = [a - b for a, b in zip(row["kld_windows"], other["kld_windows"], strict=True)]
    mean = sum(moved) / len(moved)
    error = math.sqrt(sum((d - mean) ** 2 for d in moved) / (len(moved) - 1) / len(moved))
    return f"{mean:+.5f} ± {error:.5f}"


def print_table(against: str | None, results: Path) -> None:
    rows = read_rows(results)
    print(f"{WHAT}\n")
    for scheme in dict.fromkeys(row["scheme"] for row in rows):
        of_scheme = sorted((row for row in rows if row["scheme"] == scheme), key=lambda row: row["kld"])
        other = next((row for row in of_scheme if row["name"] == against), None)
        head = HEAD + ([f"KLD less {against}'s"] if other else [])
        print(f"### {scheme} (reference ppl {of_scheme[0]['ppl_reference']:.3f})\n")
        print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
        for row in of_scheme:
            print("| " + " | ".join(cells(row) + ([paired(row, other)] if other else [])) + " |")
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="GGUF")
    parser.add_argument("--name", help="who wrote it")
    parser.add_argument("--scheme", help="Q4_K_M, ...")
    parser.add_argument("--settings", default="", help="what was chosen, in words")
    parser.add_argument("--seconds", type=float, help="CPU seconds of the quantisation")
    parser.add_argument("--own", action="store_true", help="ask quantkit's evaluator too")
    parser.add_argument("--dry-run", action="store_true", help="print the row, do not store it")
    parser.add_argument("--results", default="gguf_tiny", help="file of the rows; mixes below 3 bits: gguf_low_bits")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--against", metavar="NAME", help="with --table: paired differences to this one's row")
    args = parser.parse_args()
    results = RESULTS / f"{args.results}.json"
    if args.table:
        print_table(args.against, results)
        return
    if not (args.file and args.name and args.scheme):
        parser.error("FILE, --name and --scheme go together; or --table")
    note = {"name": args.name, "scheme": args.scheme, "settings": args.settings, "seconds": args.seconds}
    row = row_of(args.file, {k: v for k, v in note.items() if v is not None}, own=args.own)
    print(" | ".join(cells(row)))
    if not args.dry_run:
        store(row, results)


if __name__ == "__main__":
    main()
