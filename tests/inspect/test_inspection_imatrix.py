"""What `inspect` says about imatrix files of both forms."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from quantkit.formats.gguf.imatrix import ImatrixEntry, imatrix_layout, imatrix_tensors
from quantkit.formats.preallocated import PreallocatedFiles
from quantkit.inspect.imatrix import ImatrixInspection
from quantkit.inspect.path import inspect_path

UP, DOWN = "blk.1.ffn_up_exps.weight", "blk.1.ffn_down_exps.weight"
ENTRIES = (
    ImatrixEntry("blk.0.attn_q_a.weight", 1, 8),
    ImatrixEntry("blk.0.attn_k_b.weight", 2, 4),
    ImatrixEntry(UP, 4, 8, experts=True),
    ImatrixEntry(DOWN, 4, 4, experts=True),
)


def write(folder: Path, counts: Mapping[str, list[int]], fault: float | None = None) -> Path:
    """An imatrix of `ENTRIES`; ``fault`` stands for one value of attn_q_a."""
    files = PreallocatedFiles.open(folder, imatrix_layout(ENTRIES, ["a.txt", "b\n.txt"], 16, 4))
    for entry in ENTRIES:
        for expert, count in enumerate(counts[entry.name]):
            rows = 1 if entry.experts else entry.n_matrices
            importance = np.ones((rows, entry.in_features), np.float32)
            if fault is not None and "attn_q_a" in entry.name:
                importance[0, 3] = fault
            for suffix, values in imatrix_tensors(importance, [count] * rows).items():
                files.write(entry.name + suffix, expert * values.nbytes, values.tobytes())
    files.sync()
    return folder / "imatrix.gguf"


def inspected(path: Path) -> ImatrixInspection:
    found = inspect_path(path)
    assert isinstance(found, ImatrixInspection)
    return found


COUNTS = {"blk.0.attn_q_a.weight": [64], "blk.0.attn_k_b.weight": [64], UP: [3, 0, 40, 21], DOWN: [3, 0, 40, 21]}


def test_tokens_of_experts(tmp_path: Path) -> None:
    found = inspected(write(tmp_path, COUNTS))
    assert (found.datasets, found.chunks, found.weights) == (("a.txt", "'b\\n.txt'"), 16, 4)
    assert found.values == 8 + 2 * 4 + 4 * 8 + 4 * 4
    assert found.tokens == (64, 64)
    experts = found.experts
    assert experts is not None
    assert (experts.experts, experts.least, experts.median, experts.most) == (4, 0, 12, 40)
    assert experts.unseen == ("blk.1: 1",)
    assert found.unusual == ("1 experts without tokens, whose weights will all count alike: blk.1: 1",)
    (tmp_path / "all").mkdir()
    assert inspected(write(tmp_path / "all", {**COUNTS, UP: [1] * 4, DOWN: [1] * 4})).unusual == ()


def test_values_that_are_no_importance(tmp_path: Path) -> None:
    found = inspected(write(tmp_path, {**COUNTS, UP: [1] * 4, DOWN: [1] * 4}, fault=np.nan))
    assert found.unusual == ("blk.0.attn_q_a.weight: has values that are not finite.",)


def test_the_older_form(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    name = b"blk.0.attn_q_a.weight"
    values = np.ones(8, "<f4").tobytes()
    path.write_bytes(struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", 4, 8) + values)
    found = inspected(path)
    assert (found.weights, found.values, found.tokens, found.experts) == (1, 8, None, None)
    assert found.unusual[0].startswith("the older .dat form")
