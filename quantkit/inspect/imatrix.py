"""What an imatrix file holds: the texts it was made of, its weights, and how many tokens each routed expert saw.

Both forms are read. Every value is looked at once: what llama-quantize would stop at is reported.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import SourceError
from quantkit.formats.gguf.header import is_gguf
from quantkit.formats.gguf.imatrix import Imatrix
from quantkit.formats.gguf.reader import GgufReader
from quantkit.formats.safetensors.header import printable
from quantkit.inspect.storage import counted

IMATRIX_NAME = "imatrix.gguf"


@dataclass(frozen=True, slots=True)
class ExpertTokenCounts:
    """Tokens over all routed experts of all layers. ``unseen``: those that saw none, such as "blk.3: 17"."""

    experts: int
    least: int
    median: int
    most: int
    unseen: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ImatrixInspection:
    """``tokens``: least and most that a weight of no expert saw; ``experts``: of the others. Both are None in the older
    .dat form, which counts chunks. ``chunks``: None if the file does not say. ``values``: of all weights together."""

    path: Path
    datasets: tuple[str, ...]
    chunks: int | None
    weights: int
    values: int
    tokens: tuple[int, int] | None
    experts: ExpertTokenCounts | None
    unusual: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ImatrixBeside:
    """An imatrix file in the folder of a model, by its header alone. ``fitting``: its weights that the model has."""

    path: Path
    datasets: tuple[str, ...]
    chunks: int | None
    weights: int
    fitting: int


def inspect_imatrix(path: Path) -> ImatrixInspection:
    """All of an imatrix file. Raises `SourceError` for a damaged one; values that are no importance are reported."""
    unusual: list[str] = []
    by_layer: dict[str, list[int]] = {}
    dense: list[int] = []
    faulty: list[str] = []
    with Imatrix.open(path) as imatrix:
        for name, (_, n_counts) in imatrix.sizes.items():
            try:
                found = imatrix.of(name)
            except SourceError as error:
                faulty.append(printable(name))
                unusual += [error.message.removeprefix(f"{path}: ")] if len(faulty) == 1 else []
                continue
            assert found is not None, name
            counts = [int(count) for count in found[1]]
            if n_counts == 1:
                dense += counts
            else:
                layer = printable(".".join(name.split(".")[:2]))
                before = by_layer.get(layer, counts)
                by_layer[layer] = [min(pair) for pair in zip(before, counts, strict=False)]
        values = sum(n_values for n_values, _ in imatrix.sizes.values())
        weights, datasets, chunks = len(imatrix.sizes), _printable(imatrix.datasets), imatrix.chunk_count
    if len(faulty) > 1:
        unusual.append(counted("weights whose values are no importance", faulty))
    if not is_gguf(path):
        unusual.append("the older .dat form: it tells for how many chunks a weight was used, not what each expert saw.")
        return ImatrixInspection(path, datasets, chunks, weights, values, None, None, tuple(unusual))
    experts = _expert_counts(by_layer)
    if experts is not None and experts.unseen:
        unusual.append(counted("experts without tokens, whose weights will all count alike", list(experts.unseen)))
    if unseen := dense.count(0):
        unusual.append(f"{unseen:,} weights that saw no tokens.")
    tokens = (min(dense), max(dense)) if dense else None
    return ImatrixInspection(path, datasets, chunks, weights, values, tokens, experts, tuple(unusual))


def _expert_counts(by_layer: Mapping[str, list[int]]) -> ExpertTokenCounts | None:
    counts = [count for layer in by_layer.values() for count in layer]
    if not counts:
        return None
    unseen = [f"{layer}: {place}" for layer, own in by_layer.items() for place, count in enumerate(own) if not count]
    return ExpertTokenCounts(len(counts), min(counts), round(statistics.median(counts)), max(counts), tuple(unseen))


def _printable(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Names as the file has them, fit for a line."""
    return tuple(printable(text) for text in texts)


def imatrix_beside(model: GgufReader, unusual: list[str]) -> ImatrixBeside | None:
    """The imatrix in the model's folder, None if there is none. A damaged or foreign one is reported, not raised."""
    path = model.directory / IMATRIX_NAME
    if not path.exists():
        return None
    try:
        with Imatrix.open(path) as imatrix:
            known = {name: entry for name, entry in model.tensors.items() if name in imatrix.sizes}
            imatrix.check({name: (math.prod(e.shape[:-2]), e.shape[-1]) for name, e in known.items()})
            if not known:
                unusual.append(f"{IMATRIX_NAME} has none of the model's weights: it is of another model.")
            return ImatrixBeside(
                path, _printable(imatrix.datasets), imatrix.chunk_count, len(imatrix.sizes), len(known)
            )
    except SourceError as error:
        unusual.append(f"{IMATRIX_NAME}: {error.message.removeprefix(f'{path}: ')}")
        return None
