"""Conversions of the nano model from a web server that drops, stalls, truncates and garbles: each must give the files
of the conversion of the folder.

    PYTHONPATH=. python benchmarks/remote_faults.py [--runs N] [--share P] [--seed N] [--save FILE]

Some runs are killed midway, too, and go on with the same command; some see every file change its ETag midway, and must
end in one line, with nothing under the name of the result. Exits with 1 if anything was not so. tests/remote tries the
same on a smaller model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path
from random import Random
from typing import Any

import torch
from synthetic import machine

from quantkit import Recipe, recipe_for
from quantkit.errors import SourceError
from quantkit.version import __version__
from tests.remote.remote_jobs import contents, convert_from
from tests.remote.server import MOODS, Moods, serving

NANO = Path(__file__).resolve().parents[1] / "examples" / "nano-deepseek-v3"
CACHE = 2**24
"""Bytes: some layers of nano."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50, metavar="N")
    parser.add_argument("--share", type=float, default=0.2, metavar="P", help="of the requests that go wrong")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write what was found as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked process must find no lock that a thread of its parent held
    recipe = recipe_for(NANO, scheme="w4a16", method="rtn").model_copy(update={"validation": None})
    problems: list[str] = []
    done: Counter[str] = Counter()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        convert_from(str(NANO), recipe, place / "local", place / "none")
        wanted = contents(place / "local")
        for run in range(options.runs):
            draw = Random(f"{options.seed} {run}")
            problem = attempt(draw, recipe, place / "run", wanted, options.share, done)
            shutil.rmtree(place / "run", ignore_errors=True)
            if problem:
                problems.append(f"run {run}: {problem}")
            print(f"run {run}: {problem or 'identical'}", file=sys.stderr, flush=True)
    result: dict[str, Any] = {
        "what": "nano converted from a hostile web server, data-free w4a16: files against those of the folder",
        "date": date.today().isoformat(),
        **machine(),
        "quantkit": __version__,
        "command": f"python benchmarks/remote_faults.py --runs {options.runs} --share {options.share} "
        f"--seed {options.seed}",
        "runs": options.runs,
        "identical": options.runs - len(problems),
        "counts": dict(sorted(done.items())),
        "problems": problems,
        "seconds": round(time.monotonic() - start),
    }
    if options.save is not None:
        options.save.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return int(bool(problems))


def attempt(
    draw: Random, recipe: Recipe, place: Path, wanted: dict[str, bytes], share: float, done: Counter[str]
) -> str:
    """One run, which every third time is killed first, and every third time sees another version. What went wrong, ""
    if nothing."""
    place.mkdir()
    before = draw.choice(("nothing", "a kill", "a change"))
    done[f"runs after {before}"] += 1
    moods = Moods(MOODS, share, 0.6, None, Random(draw.random()))
    with serving(NANO, moods) as server:
        if before == "a kill":
            kill_midway(server.url, recipe, place, draw.uniform(0.3, 2.0))
        elif before == "a change":
            moods.change_after = draw.randrange(30, 70)
            problem = changed(server.url, recipe, place)
            moods.change_after = None
            if problem:
                return problem
        convert_from(server.url, recipe, place / "out", place / "cache", nbytes=CACHE)
        done["requests"] += len(server.seen)
        done.update({f"requests: {kind}": count for kind, count in server.faults.items()})
    return "" if contents(place / "out") == wanted else "other files"


def changed(url: str, recipe: Recipe, place: Path) -> str:
    """Convert while every file changes."""
    try:
        convert_from(url, recipe, place / "out", place / "cache", nbytes=CACHE)
    except SourceError as error:
        if "\n" in str(error) or (place / "out").exists():
            return f"a change was said in several lines, or left a result: {error}"
        return ""
    shutil.rmtree(place / "out")  # it was read before it changed
    return ""


def kill_midway(url: str, recipe: Recipe, place: Path, seconds: float) -> None:
    """Convert in a process of its own, which ends without a word after some seconds."""
    child = os.fork()
    if not child:
        try:
            convert_from(url, recipe, place / "out", place / "cache", nbytes=CACHE)
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, 9)
    os.waitpid(child, 0)
    shutil.rmtree(place / "out", ignore_errors=True)  # it was done already


if __name__ == "__main__":
    sys.exit(main())
