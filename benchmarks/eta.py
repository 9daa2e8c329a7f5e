"""How right the time left is that a conversion shows: the forecast at its start, and the ETA after each event.

    PYTHONPATH=. python benchmarks/eta.py SOURCE [--only NAME ...] [--save FILE]

SOURCE: a checkpoint of some minutes, such as the nano example. Each case is a `quantkit.convert` in a process of its
own, twice: the first may have to measure the machine. The error of an ETA is how far off the end is that it promises,
as a share of the whole; the worst counts, from a tenth of the run on and from half of it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthetic import machine

CASES: dict[str, dict[str, str]] = {
    "w4a16 rtn": {"scheme": "w4a16", "method": "rtn"},
    "w4a16 gptq": {"scheme": "w4a16"},
    "w4a16-all-g32 gptq": {"scheme": "w4a16-all-g32"},
    "w4a16 awq": {"scheme": "w4a16", "method": "awq"},
    "Q4_K_M rtn": {"preset": "Q4_K_M", "method": "rtn"},
    "Q4_K_M gptq": {"preset": "Q4_K_M"},
}


@dataclass(frozen=True, slots=True)
class Seen:
    """Seconds since the work began, and the seconds left that were shown."""

    at: float
    eta: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(CASES))
    parser.add_argument("--tokens", type=int, default=65536, help="calibration tokens of gptq and awq")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(watched(options.source, CASES[options.one], options.tokens)))
        return 0
    cases: dict[str, Any] = {}
    for name in options.only or CASES:
        command = [sys.executable, __file__, str(options.source), "--tokens", str(options.tokens), "--one", name]
        runs = [json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) for _ in range(2)]
        cases[name] = runs
        print(name, runs, file=sys.stderr, flush=True)
    result = {"what": "time left as shown, against the time it took", "source": options.source.name}
    result |= {**machine(), "tokens": options.tokens, "cases": cases}
    if options.save is not None:
        options.save.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def watched(source: Path, words: dict[str, str], tokens: int) -> dict[str, float]:
    """One conversion -> seconds, forecast / real, and the worst errors of its ETA as shares of the whole."""
    import time

    from quantkit.api import convert, recipe_for
    from quantkit.convert.events import Event
    from quantkit.convert.tally import Tally

    recipe = recipe_for(source, **words, tokens=None if words.get("method") == "rtn" else tokens)  # pyright: ignore
    tally, seen = Tally(), list[Seen]()

    def on_event(event: Event) -> None:
        tally.add(event)
        if tally.eta_s is not None:
            seen.append(Seen(time.monotonic() - tally.started, tally.eta_s))

    with tempfile.TemporaryDirectory() as folder:
        convert(source, recipe, Path(folder) / "out", on_event=on_event)
    whole = seen[-1].at

    def worst(share: float) -> float:
        return round(max(abs(each.at + each.eta - whole) for each in seen if each.at >= share * whole) / whole, 3)

    assert tally.pace is not None
    return {
        "seconds": round(whole, 1),
        "forecast_of_real": round(tally.pace.total / whole, 3),
        "worst_from_a_tenth": worst(0.1),
        "worst_from_half": worst(0.5),
    }


if __name__ == "__main__":
    sys.exit(main())
