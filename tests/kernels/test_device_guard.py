"""Triton launches kernels on the current device: each launch must happen under the device of its tensors."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantkit import kernels

FILES = sorted((Path(kernels.__file__).parent / "triton").rglob("*.py"))


def launches(tree: ast.AST, guarded: bool = False) -> Iterator[tuple[int, bool]]:
    """Line of each ``kernel[grid](...)``, and whether it lies in a ``with device_of(...)``."""
    for node in ast.iter_child_nodes(tree):
        inside = guarded or (isinstance(node, ast.With) and any(map(_guards, node.items)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            yield node.lineno, guarded
        yield from launches(node, inside and not isinstance(node, ast.FunctionDef | ast.Lambda))


def _guards(item: ast.withitem) -> bool:
    call = item.context_expr
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "device_of"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_launch_is_under_the_device_of_its_tensors(file: Path) -> None:
    tree = ast.parse(file.read_text())
    assert [line for line, guarded in launches(tree) if not guarded] == []
    kernels_here = "triton.jit" in file.read_text()
    imported_alone = file.stem in ("levels", "groups", "offset", "power", "symmetric")
    assert bool(list(launches(tree))) == (kernels_here and not imported_alone)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("kernel[grid](x)", [False]),
        ("with device_of(x):\n    kernel[(n, 1)](x, y)", [True]),
        ("with lock, device_of(x):\n    if n:\n        kernel[grid](x)", [True]),
        ("with lock:\n    kernel[grid](x)", [False]),
        ("with device_of(x):\n    def later():\n        kernel[grid](x)", [False]),
        ("x[0] + f(x)[1]", []),
    ],
)
def test_the_check_knows_a_launch_outside(code: str, expected: list[bool]) -> None:
    assert [guarded for _, guarded in launches(ast.parse(code))] == expected
