"""docs/which-format.md says of every output what the contracts of the runtimes say of a plan of DeepSeek V3."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

from quantkit.formats.planned import PlannedTensor
from quantkit.runtimes import int4_g32, mlx, transformers
from quantkit.runtimes.vllm import contract
from quantkit.schemes import Bnb4Scheme, IntScheme, Mxfp4Scheme, Mxfp8Scheme, Nvfp4Scheme, Scheme, W4AFp8Scheme
from quantkit.tensors import Role, TensorInfo, TensorSpec
from tests.formats.test_compressed_tensors_config import V3_SPECS

PAGE = (Path(__file__).parents[2] / "docs" / "which-format.md").read_text(encoding="utf-8")
CT = "compressed-tensors"
ROWS: dict[str, tuple[str, Scheme | None, Scheme | None]] = {
    "int4 g128": (CT, IntScheme(), IntScheme()),
    "int4 g32": (CT, IntScheme(group_size=32), None),
    "int3 g128": (CT, IntScheme(bits=3), IntScheme(bits=3)),
    "int8 g128": (CT, IntScheme(bits=8), IntScheme(bits=8)),
    "NVFP4": (CT, Nvfp4Scheme(), Nvfp4Scheme()),
    "MXFP4": (CT, Mxfp4Scheme(), Mxfp4Scheme()),
    "MXFP8": (CT, Mxfp8Scheme(), Mxfp8Scheme()),
    "W4A8-FP8": (CT, W4AFp8Scheme(), IntScheme(bits=8)),
    "GPTQ": ("gptq", IntScheme(), IntScheme()),
    "AWQ": ("awq", IntScheme(symmetric=False), IntScheme(symmetric=False)),
    "bitsandbytes": ("bitsandbytes", None, Bnb4Scheme()),
}
"""Row of the page -> layout, scheme of the routed experts, scheme of the other linears; GGUF is no folder."""
VLLM, HOPPER, LLAMA_CPP, MLX, TRANSFORMERS = (0, 1, 2), 1, 4, 6, 7
"""Columns that the code knows."""


def planned(experts: Scheme | None, others: Scheme | None) -> list[PlannedTensor]:
    def scheme(spec: TensorSpec) -> Scheme | None:
        return None if spec.role is Role.MTP or not spec.linear else experts if spec.expert is not None else others

    found = [(spec, scheme(spec)) for spec in V3_SPECS]
    return [
        PlannedTensor(TensorInfo(spec.name, spec.shape, "BF16"), chosen, None if chosen else "BF16", spec)
        for spec, chosen in found
    ]


def texts(lines: list[str]) -> list[str]:
    """Without the linears that a note is about."""
    return [re.sub(r"^.*?\): ", "", line) for line in lines]


@dataclass(frozen=True)
class Told:
    """What each runtime says of an output."""

    vllm: list[str]
    wrong: list[str]
    transformers: list[str]
    mlx: list[str]
    readers: list[str]


@lru_cache
def told(row: str) -> Told:
    layout, experts, others = ROWS[row]
    tensors = planned(experts, others)
    assert contract.problems(tensors, layout) == []
    ask = (contract.notes, transformers.problems, transformers.notes, mlx.notes, int4_g32.notes)
    return Told(*(texts(of_runtime(tensors, layout)) for of_runtime in ask))


def said(row: str) -> list[str]:
    """All of it, in the order of the plan."""
    found = told(row)
    return [*found.vllm, *found.wrong, *found.transformers, *found.mlx, *found.readers]


def table(heading: str) -> list[list[str]]:
    """Rows of the first table that begins with a column of this name after a heading, "" for the top of the page."""
    part = PAGE.split(heading, 1)[1] if heading else PAGE
    lines = part[part.index("| output |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture(scope="module")
def cells() -> dict[str, list[str]]:
    return {name: row for name, *row in table("")}


def test_every_output_has_a_row(cells: dict[str, list[str]]) -> None:
    assert set(cells) == {*ROWS, "GGUF"}
    assert all(len(row) == 8 for row in cells.values())


def test_the_notes_are_those_of_the_code() -> None:
    shown = [(name, text) for name, text in table("## What a plan says of each")]
    assert shown == [(name, text) for name in ROWS for text in said(name)]


@pytest.mark.parametrize("row", ROWS)
def test_cells_follow_the_notes(row: str, cells: dict[str, list[str]]) -> None:
    layout, found, own = ROWS[row][0], told(row), cells[row]
    for column in VLLM:
        verdict = (
            "no" if any("does not read" in text for text in found.vllm) else "from 0.33 on" if found.vllm else "yes"
        )
        if any("on Hopper alone" in text for text in found.vllm):
            verdict = "yes" if column == HOPPER else "no"
        if any("reads it (0.24 or newer)" in text for text in found.vllm):
            verdict = "yes"
        assert own[column].partition(",")[0] == verdict, column
    wrong = [*found.wrong, *found.transformers]
    if wrong or row not in ("int3 g128", "W4A8-FP8", "bitsandbytes"):
        assert own[TRANSFORMERS] == ("no" if wrong else "yes")
    needs = "compressed-tensors 0.18 or newer"
    assert (own[TRANSFORMERS] == needs) == any(f"transformers needs {needs}" in text for text in found.vllm)
    if layout in (CT, "bitsandbytes"):
        assert own[MLX] == ("no" if found.mlx else "yes")
    assert own[LLAMA_CPP] == "no"


def test_readers_of_int4_g32_have_a_yes_in_no_other_words(cells: dict[str, list[str]]) -> None:
    (line,) = told("int4 g32").readers
    assert all(name in line for name in ("vLLM", "SGLang", "ktransformers (RAWINT4)", "MLX", "B200"))
    assert [cell for column, cell in enumerate(cells["int4 g32"]) if not cell.startswith("yes")] == ["no"]
    assert "`RAWINT4`" in cells["int4 g32"][5]


def test_experts_with_one_scale_a_row_are_warned_of() -> None:
    rows = IntScheme(group_size=None)
    (line,) = contract.notes(planned(rows, IntScheme()), CT)
    assert "--moe-backend marlin" in line
    assert "one scale a row" in PAGE
