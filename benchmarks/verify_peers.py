"""What `quantkit verify` and `quantkit inspect` say of checkpoints that other packages wrote.

    python benchmarks/verify_peers.py --source ORIGINAL "llm-compressor 0.14.0.1, W4A16=FOLDER" NAME=FOLDER...

`benchmarks/peers/write_checkpoint.py` writes such folders, llama.cpp's own quantiser (benchmarks/llama_cpp) GGUF files.
Rows go to results/verify_peers.json; those of other names stay.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import quantkit
from quantkit.errors import QuantkitError
from quantkit.inspect.folder import Inspection
from quantkit.inspect.gguf import GgufInspection
from quantkit.verify.verification import Finding
from quantkit.version import __version__

RESULTS = Path(__file__).resolve().parent / "results" / "verify_peers.json"
NOT_OF_PEERS = "no quantkit.json with checksums"
"""A note that is true of every such folder."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="the folder that all of them were made of")
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=FOLDER")
    options = parser.parse_args()
    rows = {} if not RESULTS.exists() else {row["name"]: row for row in json.loads(RESULTS.read_text())["rows"]}
    for entry in options.checkpoints:
        name, _, path = entry.partition("=")
        rows[name] = {"name": name, **found(Path(path), options.source)}
        print(name, json.dumps(rows[name], indent=1))
    what = "quantkit verify --source and quantkit inspect of what other packages made of tiny-deepseek-v3"
    head = {"what": what, "date": date.today().isoformat(), "versions": {"quantkit": __version__}}
    RESULTS.write_text(json.dumps({**head, "rows": list(rows.values())}, indent=1, ensure_ascii=False) + "\n")


def found(path: Path, source: Path) -> dict[str, Any]:
    """Findings for the runtimes that read the format; "error" where it cannot be opened."""
    try:
        said = quantkit.verify(path, source=source)
    except QuantkitError as error:
        return {"error": error.message.replace(str(path), path.name)}
    return {
        "stored_as": said.stored_as,
        "tensors": said.tensors,
        "compared": said.contents.compared,
        "faults": [line(finding) for finding in said.faults],
        "notes": [line(finding) for finding in said.notes if NOT_OF_PEERS not in finding.text],
        "unusual": unusual(path),
    }


def line(finding: Finding) -> str:
    """As the command line prints it."""
    return f"{finding.runtime}: {finding.text}" if finding.runtime else finding.text


def unusual(path: Path) -> list[str]:
    """What `inspect` says."""
    said = quantkit.inspect(path)
    return list(said.unusual) if isinstance(said, Inspection | GgufInspection) else []


if __name__ == "__main__":
    main()
