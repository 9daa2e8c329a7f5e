"""Conversions of remote sources in a moment: impatient, with a small cache."""

from __future__ import annotations

import json
from pathlib import Path

from quantkit.convert.events import Report, ignore
from quantkit.convert.prepare import prepared
from quantkit.convert.run import convert
from quantkit.formats.remote.fetch import Patience
from quantkit.formats.remote.places import CacheOptions, places
from quantkit.plan.machine import Machine
from quantkit.plan.recipe import Recipe

IMPATIENT = Patience(timeout=0.5, tries=12, first_pause=0.001, longest_pause=0.02)
"""For a server on loopback."""
BUDGET = 2**30
PIECE_BYTES = 2**14
"""Many pieces of a small model."""


def convert_from(
    source: str, recipe: Recipe, out: Path, cache: Path, *, nbytes: int | None = 2**26, patience: Patience = IMPATIENT
) -> Report:
    """Convert what lies at an address, or in a folder, as `quantkit.convert` does; texts lie beside ``out``."""
    with places([source], CacheOptions(cache, nbytes, patience, PIECE_BYTES)) as found:
        folder, storage = found.folders[0], found.storage
        with prepared(folder, None, recipe, out, out.parent, BUDGET, restart=False, storage=storage) as job:
            return convert(job, Machine.of("cpu", BUDGET), ignore)


def contents(out: Path) -> dict[str, bytes]:
    """Files of a result by relative name; of quantkit.json without the origin, which a folder has not."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    for name, data in found.items():
        if name.endswith("quantkit.json"):
            document = json.loads(data)
            document["job"].pop("origin", None)
            found[name] = json.dumps(document).encode()
    return found


def cached_bytes(cache: Path) -> int:
    """Bytes of all pieces."""
    return sum(path.stat().st_size for path in cache.glob("pieces-*/*/*"))
