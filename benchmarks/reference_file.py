"""What a reference's file costs in exactness: KL divergence by the file against the true one, for several sizes.

    python benchmarks/reference_file.py REFERENCE CANDIDATE... [--tops 512,128,32] [--windows 8]

Prints a line for each candidate and number of most likely tokens kept; perplexities and first choices are asserted to
be the same.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from quantkit.pipeline import evaluation


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("reference", type=Path)
    parser.add_argument("candidates", type=Path, nargs="+")
    parser.add_argument("--tops", default="512,128,32")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--context", type=int, default=256)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for top in map(int, options.tops.split(",")):
            evaluation.TOP = top
            file = Path(folder) / f"top-{top}"
            chosen = {"context": options.context, "max_windows_per_file": options.windows, "noise_floor": top == 512}
            exact = evaluation.evaluate(options.reference, options.candidates, save_reference=file, **chosen)
            by_file = evaluation.evaluate(file, options.candidates)
            if top == 512:
                report(top, "noise floor", exact.noise_floor.result.overall, None, file)
            for one, other in zip(exact.candidates, by_file.candidates, strict=True):
                true, bound = one.result.overall, other.result.overall
                assert bound.same_top == true.same_top
                assert abs(bound.log_ratio.mean - true.log_ratio.mean) < 1e-6
                report(top, one.model.name, true, bound, file)


def report(top: int, name: str, true, bound, file: Path) -> None:
    line = f"top {top:4} {name:12} tokens {true.tokens:,} KLD {true.kld.mean:.6f} ± {true.kld.standard_error:.6f}"
    if bound is not None:
        less = 1 - bound.kld.mean / true.kld.mean
        tail = 1 - bound.kld.p999 / true.kld.p999
        line += f" by file {bound.kld.mean:.6f}: {less:.3%} less; 99.9 % {true.kld.p999:.4f}: {tail:.3%} less"
    print(f"{line}; file {file.stat().st_size / true.tokens:,.0f} B/token", flush=True)


if __name__ == "__main__":
    main()
