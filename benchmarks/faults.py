"""Every call that writes, one after the other: each fails in five ways, then the same command runs without fault.

    PYTHONPATH=. python benchmarks/faults.py [--faults EIO "killed after"] [--every N] [--save FILE]

A small model becomes a folder and a GGUF file in one calibrated pass; the files after the second run must be those of
an unbroken one, and what a failed run says must be one line. Exits with 1 if anything was not. tests/faults tries a
sample of the same calls.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.faults.injected import FAULTS, FaultyJob
from tests.faults.small_job import small_job


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th call")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write what was found as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked process must find no lock that a thread of its parent held
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        job = small_job(Path(folder))
        found = {fault: sweep(job, Path(folder) / "tried" / "out", fault, options.every) for fault in options.faults}
        result = {
            "what": "every call that writes, failing once; files after the same command again",
            "calls": len(job.calls),
            "every": options.every,
            "faults": found,
            "seconds": round(time.monotonic() - start),
        }
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if options.save:
        options.save.write_text(text)
    return int(any(fault["problems"] for fault in found.values()))


def sweep(job: FaultyJob, out: Path, fault: str, every: int) -> dict[str, object]:
    """Cases tried, and a line for each that went wrong."""
    problems: list[str] = []
    numbers = range(0, len(job.calls), every)
    tried = [at for at in numbers if fault != "short write" or job.calls[at].startswith("pwrite")]
    for at in tried:
        out.parent.mkdir()
        problem = job.problem(out, at, fault)
        if problem:
            problems.append(f"{at} {job.calls[at]}: {problem}")
        shutil.rmtree(out.parent)
    print(f"{fault}: {len(tried)} cases, {len(problems)} problems", file=sys.stderr, flush=True)
    return {"cases": len(tried), "problems": problems}


if __name__ == "__main__":
    sys.exit(main())
