"""Damaged files for every reader: each must be read or refused in a line, in 5 s and 500 MB.

    PYTHONPATH=. python benchmarks/fuzz.py [--only GGUF recipe] [--binary N] [--text N] [--seed N] [--save FILE]
    PYTHONPATH=. python benchmarks/fuzz.py --only GGUF --case 1234      # one case again: its bytes, and what it raises

Exits with 1 if anything was wrong. tests/faults tries the first cases of each reader.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from synthetic import machine

from quantkit.version import __version__
from tests.faults.binary_readers import binary_readers
from tests.faults.fuzzing import CPU_SECONDS, EXTRA_BYTES, Found, Reader, case_of, fuzz
from tests.faults.text_readers import text_readers

SHARED_MEMORY = Path("/dev/shm")


def main() -> int:
    options = arguments()
    torch.set_num_threads(1)  # a forked process must find no lock that a thread of its parent held
    place = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        readers = [*binary_readers(Path(folder) / "binary"), *text_readers(Path(folder) / "text")]
        chosen = [reader for reader in readers if not options.only or reader.name in options.only]
        if options.case is not None:
            return again(chosen[0], options.seed, options.case)
        results = [save(options, {reader.name: tried(reader, options)}) for reader in chosen]
    print(json.dumps(results[-1], indent=1))
    return int(any(reader["problems"] for reader in results[-1]["readers"].values()))


def save(options: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """The whole result; written beside what the file has of other readers, so that a run that is stopped loses one."""
    file: Path | None = options.save
    others = json.loads(file.read_text())["readers"] if file is not None and file.exists() else {}
    result = {
        "what": "damaged files for each reader: read, or refused in one line",
        "date": date.today().isoformat(),
        **machine(),
        "quantkit": __version__,
        "command": f"python benchmarks/fuzz.py --binary {options.binary} --text {options.text} --seed {options.seed}",
        "allowed": {"cpu_seconds": CPU_SECONDS, "extra_bytes": EXTRA_BYTES},
        "readers": {**others, **found},
    }
    if file is not None:
        file.write_text(json.dumps(result, indent=1) + "\n")
    return result


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="READER", help="names as the result has them")
    parser.add_argument(
        "--binary", type=int, default=200_000, metavar="N", help="cases for each reader of a binary file"
    )
    parser.add_argument("--text", type=int, default=10_000, metavar="N", help="cases for each reader of a text file")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument("--case", type=int, metavar="N", help="only this case of the one reader in --only")
    parser.add_argument("--save", type=Path, metavar="FILE", help="add what was found to this JSON file")
    return parser.parse_args()


def tried(reader: Reader, options: argparse.Namespace) -> dict[str, object]:
    """What became of a reader's cases; a line of it at once."""
    found: Found = fuzz(reader, options.seed, range(options.binary if reader.binary else options.text))
    kind = "binary" if reader.binary else "text"
    print(f"{reader.name}: {found.cases:,} cases in {found.seconds} s, {found.problems}", file=sys.stderr, flush=True)
    return {"kind": kind, **asdict(found)}


def again(reader: Reader, seed: int, number: int) -> int:
    """One case in this process, with its traceback."""
    content = case_of(reader, seed, number)
    print(content[:4000])
    reader.file.write_bytes(content)
    reader.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
