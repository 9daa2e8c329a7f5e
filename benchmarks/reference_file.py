"""What a reference's file costs in exactness: KL divergence by the file against the true one, for several sizes.

    python benchmarks/reference_file.py REFERENCE CANDIDATE... [--tops 512,128,32] [--windows 8] [--out FILE.json]

Prints a line for each candidate and number of most likely tokens kept; perplexities and first choices are asserted to
be the same. ``--out``: also add the lines to a list of JSON objects in FILE.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from quantkit import evaluate
from quantkit.documents.evaluation import Evaluation
from quantkit.evaluate import run as evaluation


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("reference", type=Path)
    parser.add_argument("candidates", type=Path, nargs="+")
    parser.add_argument("--tops", default="512,128,32")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for top in map(int, options.tops.split(",")):
            evaluation.TOP = top
            file = Path(folder) / f"top-{top}"
            exact = evaluate(
                options.reference,
                options.candidates,
                save_reference=file,
                context=options.context,
                max_windows_per_file=options.windows,
                noise_floor=False,
            )
            by_file = evaluate(file, options.candidates)
            found += rows(exact, by_file, file.stat().st_size)
    for row in found:
        print(json.dumps(row))
    if options.out is not None:
        known = json.loads(options.out.read_text()) if options.out.exists() else []
        options.out.write_text("[\n" + ",\n".join(json.dumps(row) for row in [*known, *found]) + "\n]\n")


def rows(exact: Evaluation, by_file: Evaluation, nbytes: int) -> list[dict[str, Any]]:
    facts = by_file.reference_file
    assert facts is not None
    listed = []
    for one, other in zip(exact.candidates, by_file.candidates, strict=True):
        true, bound = one.result.overall, other.result.overall
        assert bound.same_top == true.same_top
        assert abs(bound.log_ratio.mean - true.log_ratio.mean) < 1e-6
        listed.append(
            {
                "model": exact.reference.name,
                "candidate": one.model.name,
                "top": facts.top,
                "mean_rest": facts.mean_rest,
                "tokens": true.tokens,
                "bytes_per_token": nbytes / true.tokens,
                "kld": true.kld.mean,
                "kld_standard_error": true.kld.standard_error,
                "kld_by_file": bound.kld.mean,
                "less": 1 - bound.kld.mean / true.kld.mean,
            }
        )
    return listed


if __name__ == "__main__":
    main()
