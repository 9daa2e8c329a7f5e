"""imatrix files: for each weight the sum of squares of its inputs and the number of tokens.

Written beside a model, through the same preallocated files, layer by layer in any order; and read, llama.cpp's own
included, in its GGUF form and the older .dat form. Two F32 tensors a weight, ``<weight>.in_sum2`` and
``<weight>.counts``; dimensions as llama.cpp writes them, those of 1 at the end left out:

    dense weight                    in_sum2 (in,)           counts (1,)
    3-D attn_k_b, attn_v_b          in_sum2 (heads * in,)   counts (1,)         every head sees every token
    routed experts, stacked         in_sum2 (experts, in)   counts (experts, 1)

Source: tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp and tools/quantize/quantize.cpp of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import SourceError
from quantkit.formats.gguf.header import is_gguf
from quantkit.formats.gguf.imatrix_dat import DatImatrix
from quantkit.formats.gguf.layout import GgufTensor, layout_gguf
from quantkit.formats.gguf.reader import GgufReader
from quantkit.formats.gguf.values import string, strings, u32
from quantkit.formats.preallocated import FilesLayout
from quantkit.formats.safetensors.header import printable

SUMS = ".in_sum2"
COUNTS = ".counts"
IMATRIX_STEM = "imatrix"
MAX_TOKENS = 2**53


@dataclass(frozen=True, slots=True)
class ImatrixEntry:
    """One weight of the GGUF model: ``n_matrices`` matrices (experts, heads; 1 if it is 2-D) of ``in_features``
    columns. ``experts``: each matrix has tokens, and so a count, of its own."""

    name: str
    n_matrices: int
    in_features: int
    experts: bool = False

    def tensors(self) -> tuple[GgufTensor, GgufTensor]:
        """The two tensors that store the weight's importance: sums and counts."""
        if self.experts:
            sums, counts = (self.n_matrices, self.in_features), (self.n_matrices, 1)
        else:
            sums, counts = (self.n_matrices * self.in_features,), (1,)
        return GgufTensor(self.name + SUMS, sums, "F32"), GgufTensor(self.name + COUNTS, counts, "F32")


def imatrix_layout(
    entries: Iterable[ImatrixEntry],
    datasets: Sequence[str],
    chunk_count: int,
    chunk_size: int,
    stem: str = IMATRIX_STEM,
) -> FilesLayout:
    """Layout of ``<stem>.gguf``, weights by name. llama-quantize needs all three numbers: names of the calibration
    texts, and tokens seen as ``chunk_count`` chunks of ``chunk_size``."""
    key_values = {
        "general.type": string("imatrix"),
        "imatrix.datasets": strings(datasets),
        "imatrix.chunk_count": u32(chunk_count),
        "imatrix.chunk_size": u32(chunk_size),
    }
    ordered = sorted(entries, key=lambda entry: entry.name.encode())
    return layout_gguf(stem, key_values, [tensor for entry in ordered for tensor in entry.tensors()])


def imatrix_tensors(importance: NDArray[np.float32], n_tokens: Sequence[int]) -> dict[str, NDArray[np.float32]]:
    """What is stored of one dense weight, of all heads of a 3-D one, or of one expert: suffix -> values.

    importance (B, in): mean squares; n_tokens: tokens of each row, the same for all heads. An expert's values lie at
    ``expert * values.nbytes`` of its two tensors, all others at 0.
    """
    assert len(set(n_tokens)) == 1, "heads of one weight see the same tokens; experts are written one by one"
    sums = importance.astype(np.float64) * n_tokens[0]
    return {SUMS: sums.astype(np.float32), COUNTS: np.array([n_tokens[0]], np.float32)}


class Imatrix:
    """An imatrix file. An open resource: use it in ``with``, or `close` it. Values are read when `of` asks for them."""

    def __init__(self, path: Path, content: _GgufImatrix | DatImatrix) -> None:
        self.path = path
        self._content = content

    @classmethod
    def open(cls, path: Path) -> Imatrix:
        """Raises `SourceError` for a file that is no imatrix, is damaged, or lacks one of a weight's two tensors."""
        return cls(path, _GgufImatrix(path) if is_gguf(path) else DatImatrix(path))

    def __enter__(self) -> Imatrix:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._content.close()

    @property
    def sizes(self) -> Mapping[str, tuple[int, int]]:
        """Weight name -> number of values, number of counts."""
        return self._content.sizes

    @property
    def datasets(self) -> tuple[str, ...]:
        """Names of the texts it was made with, as far as the file says."""
        return self._content.datasets

    @property
    def chunk_count(self) -> int | None:
        """Chunks of text it was made with, None if the file does not say."""
        return self._content.chunk_count

    def of(
        self, weight_name: str, n_matrices: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]] | None:
        """importance (n, in) and counts (n,) of a weight, or None if the file has none.

        ``n_matrices`` cuts the values of a 3-D attn_k_b or attn_v_b, which have one count, by head. An expert that
        saw no token has ones, as in llama-quantize. Counts are tokens; in a .dat file chunks.

        Raises `SourceError` for values that are negative or not finite, counts beyond `MAX_TOKENS`, and values that
        ``n_matrices`` does not divide.
        """
        if weight_name not in self.sizes:
            return None
        sums, counts = self._content.read(weight_name)
        n_counts = len(counts)
        count = n_matrices or n_counts
        if len(sums) % count or n_counts not in (1, count):
            found = f"{len(sums):,} values and {n_counts:,} counts"
            raise self._error(weight_name, f"has {found}, which are not those of {count:,} matrices")
        if not (np.isfinite(sums).all() and np.isfinite(counts).all()):
            raise self._error(weight_name, "has values that are not finite")
        if (sums < 0).any() or (counts < 0).any():
            raise self._error(weight_name, "has negative values")
        if counts.max() > MAX_TOKENS:
            raise self._error(weight_name, f"claims {counts.max():.3g} tokens")
        tokens = np.broadcast_to(np.floor(counts.astype(np.float64) + 0.5).astype(np.int64), (count,))
        importance = sums.reshape(count, -1) / np.maximum(tokens, 1).astype(np.float32)[:, None]
        importance[tokens == 0] = 1
        return importance, tokens

    def check(self, expected: Mapping[str, tuple[int, int]]) -> list[str]:
        """Hold the file against the weights of a model, name -> (n_matrices, in_features); returns the names that it
        lacks.

        Raises `SourceError` if a size contradicts, or if it has none of the weights: it is of another model.
        """
        hint = "It is the imatrix of another model."
        wrong = [name for name, (count, width) in expected.items() if not self._fits(name, count, width)]
        if wrong:
            values, counts = self.sizes[wrong[0]]
            count, width = expected[wrong[0]]
            found = f"has {values:,} values and {counts:,} counts, this model needs {count:,} x {width:,} values"
            more = f" ({len(wrong) - 1:,} more weights differ)" if len(wrong) > 1 else ""
            raise SourceError(f"{self.path}: {printable(wrong[0])}: {found}{more}.", hint=hint)
        missing = [name for name in expected if name not in self.sizes]
        if expected and len(missing) == len(expected):
            found = f"has none of the {len(missing):,} weights of this model, such as {missing[0]}"
            raise SourceError(f"{self.path}: {found}.", hint=hint)
        return missing

    def _fits(self, name: str, count: int, width: int) -> bool:
        if name not in self.sizes:
            return True
        values, counts = self.sizes[name]
        return values == count * width and counts in (1, count)

    def _error(self, name: str, problem: str) -> SourceError:
        return SourceError(f"{self.path}: {printable(name)}: {problem}.", hint="Make the imatrix again.")


class _GgufImatrix:
    """The GGUF form."""

    def __init__(self, path: Path) -> None:
        self._reader = GgufReader(path)
        kind = self._reader.get("general.type")
        if kind != "imatrix":
            what = "no general.type" if kind is None else f"the general.type {printable(repr(kind))}"
            raise SourceError(f"{path}: has {what}, an imatrix was needed.")
        self.sizes = self._paired(path)
        datasets = self._reader.get("imatrix.datasets")
        self.datasets = tuple(str(item) for item in datasets) if isinstance(datasets, tuple) else ()
        chunks = self._reader.get("imatrix.chunk_count")
        self.chunk_count = chunks if isinstance(chunks, int) else None

    def read(self, name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Sums and counts, one dimension each."""
        return self._floats(name + SUMS), self._floats(name + COUNTS)

    def close(self) -> None:
        self._reader.close()

    def _floats(self, name: str) -> NDArray[np.float32]:
        return self._reader.read_array(name).view("<f4")

    def _paired(self, path: Path) -> dict[str, tuple[int, int]]:
        """Sizes by weight name. Other tensors (newer versions also store ``.in_sum``) are passed over."""
        tensors = self._reader.tensors
        suffixes = (SUMS, COUNTS)
        names = dict.fromkeys(name.removesuffix(end) for name in tensors for end in suffixes if name.endswith(end))
        sizes: dict[str, tuple[int, int]] = {}
        for name in names:
            for end in suffixes:
                if name + end not in tensors:
                    raise SourceError(f"{path}: {name} lacks its tensor {end}.", hint="Make the imatrix again.")
                if tensors[name + end].kind != "F32":
                    raise SourceError(f"{path}: {name}{end} is {tensors[name + end].kind}, F32 was needed.")
            values, counts = (tensors[name + end].nbytes // 4 for end in suffixes)
            if values % counts:
                raise SourceError(f"{path}: {name} has {values:,} values, no multiple of its {counts:,} counts.")
            sizes[name] = values, counts
        if not sizes:
            raise SourceError(f"{path}: holds no weights.", hint="Make the imatrix again.")
        return sizes
