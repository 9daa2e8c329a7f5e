"""Two GGUF files side by side: does each tensor have the same type, shape and bytes?

    python benchmarks/llama_cpp/plan.py A.gguf B.gguf [--content]

Lists what differs and exits with 1 if anything does. --content also counts, for each type, the tensors and the blocks
whose data are the same to the byte: two searches for the best scales seldom agree in all.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import gguf
import numpy as np

Plan = dict[str, tuple[str, tuple[int, ...], int]]


def plan_of(reader: gguf.GGUFReader) -> Plan:
    """Name -> type, dimensions in the file's order, bytes."""
    tensors = reader.tensors
    return {t.name: (t.tensor_type.name, tuple(int(n) for n in t.shape), int(t.n_bytes)) for t in tensors}


def differences(a: Plan, b: Plan) -> list[str]:
    missing = [f"{name}: only in the first file" for name in a.keys() - b.keys()]
    missing += [f"{name}: only in the second file" for name in b.keys() - a.keys()]
    changed = [f"{name}: {a[name]} and {b[name]}" for name in a.keys() & b.keys() if a[name] != b[name]]
    return sorted(missing + changed)


def show_totals(plan: Plan) -> None:
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for kind, _, nbytes in plan.values():
        totals[kind][0] += 1
        totals[kind][1] += nbytes
    for kind, (count, nbytes) in sorted(totals.items()):
        print(f"  {kind:8} {count:6} tensors {nbytes:20,} bytes")
    print(f"  {'all':8} {len(plan):6} tensors {sum(nbytes for _, _, nbytes in plan.values()):20,} bytes")


def show_equal_blocks(a: gguf.GGUFReader, b: gguf.GGUFReader) -> None:
    others = {tensor.name: tensor for tensor in b.tensors}
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for tensor in a.tensors:
        other = others.get(tensor.name)
        if other is None or other.tensor_type != tensor.tensor_type or other.n_bytes != tensor.n_bytes:
            continue
        block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]
        mine, theirs = (np.frombuffer(t.data, np.uint8).reshape(-1, block_bytes) for t in (tensor, other))
        same = int((mine == theirs).all(axis=1).sum())
        for index, value in enumerate((same == len(mine), 1, same, len(mine))):
            counts[tensor.tensor_type.name][index] += value
    for kind, (tensors, of_tensors, blocks, of_blocks) in sorted(counts.items()):
        print(f"  {kind:8} the same bytes in {tensors} of {of_tensors} tensors, {blocks:,} of {of_blocks:,} blocks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--content", action="store_true")
    args = parser.parse_args()
    readers = [gguf.GGUFReader(path) for path in (args.first, args.second)]
    plans = [plan_of(reader) for reader in readers]
    for path, plan in zip((args.first, args.second), plans, strict=True):
        print(path)
        show_totals(plan)
    problems = differences(*plans)
    print("\n".join(problems) or "The plans are the same.")
    if args.content:
        show_equal_blocks(*readers)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
