"""Every call that writes, one after the other: each fails in five ways, then the same command runs without fault. Then
chains of kills at random calls, and files of OUT.partial that were damaged after a kill.

    PYTHONPATH=. python benchmarks/faults.py [--faults EIO "killed after"] [--every N] [--chains N] [--tampered N]
        [--save FILE]

A small model becomes a folder and a GGUF file in one calibrated pass; the files after the second run must be those of
an unbroken one, and what a failed run says must be one line. After damage a refusal is right, too, and other bytes
without a word are not. Exits with 1 if anything was not. tests/faults tries a sample of the same calls.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from synthetic import machine

from quantkit.version import __version__
from tests.faults.injected import FAULTS, FaultyJob
from tests.faults.small_job import small_job

CHAINS, DAMAGE = "chains of kills", "damage after a kill"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", nargs="*", choices=FAULTS, default=FAULTS)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th call")
    parser.add_argument("--chains", type=int, default=100, metavar="N", help="chains of up to six kills, 0: none")
    parser.add_argument("--tampered", type=int, default=300, metavar="N", help="files damaged after a kill, 0: none")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write what was found as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked process must find no lock that a thread of its parent held
    with tempfile.TemporaryDirectory() as folder:
        job, out = small_job(Path(folder)), Path(folder) / "tried" / "out"
        result: dict[str, Any] = {
            "what": "every call that writes, failing once; kills; damage. Files after the same command again",
            "date": date.today().isoformat(),
            **machine(),
            "quantkit": __version__,
            "command": f"python benchmarks/faults.py --every {options.every} --seed {options.seed}",
            "calls": len(job.calls),
            "kinds": dict.fromkeys((*FAULTS, CHAINS, DAMAGE), "not tried"),
        }
        for kind, attempt in attempts(job, out, options).items():
            start = time.monotonic()
            result["kinds"][kind] = "not finished"
            save(result, options.save)
            result["kinds"][kind] = {**attempt(), "seconds": round(time.monotonic() - start)}
            save(result, options.save)
    print(json.dumps(result, indent=1))
    return int(any(isinstance(kind, dict) and kind["problems"] for kind in result["kinds"].values()))


def attempts(job: FaultyJob, out: Path, options: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """By kind what tries it: cases, and a line for each that went wrong."""
    made: dict[str, Callable[[], dict[str, Any]]] = {
        fault: partial(sweep, job, out, fault, options.every) for fault in options.faults
    }
    if options.chains:
        made[CHAINS] = partial(chains, job, out, options.chains, Random(f"chains {options.seed}"))
    if options.tampered:
        made[DAMAGE] = partial(tampered, job, out, options.tampered, Random(f"tampered {options.seed}"))
    return made


def save(result: dict[str, Any], path: Path | None) -> None:
    """After each kind: a run that is stopped has told what it has found."""
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")


def sweep(job: FaultyJob, out: Path, fault: str, every: int) -> dict[str, Any]:
    """One fault at every N-th call."""
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
    return {"every": every, "cases": len(tried), "problems": problems}


def chains(job: FaultyJob, out: Path, count: int, draw: Random) -> dict[str, Any]:
    """``cases``: chains; ``kills``: in all of them."""
    problems: list[str] = []
    total = 0
    for number in range(count):
        out.parent.mkdir()
        kills, problem = job.chain(out, draw)
        total += kills
        if problem:
            problems.append(f"chain {number}, {kills} kills: {problem}")
        shutil.rmtree(out.parent)
    print(f"chains: {count} of {total} kills, {len(problems)} problems", file=sys.stderr, flush=True)
    return {"cases": count, "kills": total, "problems": problems}


def tampered(job: FaultyJob, out: Path, count: int, draw: Random) -> dict[str, Any]:
    """``cases`` in which there was something to damage."""
    done: list[str] = []
    problems: list[str] = []
    while len(done) < count:
        out.parent.mkdir()
        what, problem = job.tampered(out, draw)
        if what != "nothing":
            done.append(what)
        if problem:
            problems.append(f"{what}: {problem}")
            print(problems[-1], file=sys.stderr, flush=True)
        shutil.rmtree(out.parent)
    print(f"tampered: {count} cases, {len(problems)} problems", file=sys.stderr, flush=True)
    return {"cases": count, "problems": problems}


if __name__ == "__main__":
    sys.exit(main())
