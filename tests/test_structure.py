"""How the package is built, beyond what `lint-imports` checks: sizes, circles, class names, who knows tensor names."""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "quantkit"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_ROOM_SHARE = 0.15
TENSOR_NAMES = re.compile(
    r"(q_a|q_b|q|k|v|o|kv_b|gate|up|down|gate_up|eh)_proj|kv_a_proj|shared_head|embed_tokens|lm_head|mlp\.gate|\.experts\."
)
KNOW_TENSOR_NAMES = ("arch/", "runtimes/", "tensors.py")
"""Families say where tensors sit, runtimes what their own modules are called; one role is spelled like a tensor."""
KNOW_ONE_NAME = {
    # Readers of the format build a module of this name even where a checkpoint has no such tensor (tied embeddings).
    ("formats/layouts/compressed_tensors_config.py", "lm_head"),
}
"""Files that know one name of their format's readers, and why."""
COMPILED = "kernels/"
"""Functions that a compiler takes whole may be long."""


@cache
def trees() -> dict[str, ast.Module]:
    """Syntax trees by path inside the package, and so the modules."""
    return {
        path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def module_of(path: str) -> str:
    return ".".join(("quantkit", *Path(path).with_suffix("").parts)).removesuffix(".__init__")


@cache
def imports() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports, in functions and for type checkers too."""
    modules = {module_of(path) for path in trees()}
    found: dict[str, set[str]] = {}
    for path, tree in trees().items():
        own = found.setdefault(module_of(path), set())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in modules | {"quantkit"}:
                targets = {f"{node.module}.{alias.name}" for alias in node.names}
                own |= {target if target in modules else node.module for target in targets}
            elif isinstance(node, ast.Import):
                own |= {alias.name for alias in node.names if alias.name in modules}
    return found


def reachable(start: str) -> set[str]:
    """Modules that ``start`` imports, directly or not."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for module in imports().get(waiting.pop(), set()):
            if module not in seen:
                seen.add(module)
                waiting.append(module)
    return seen


def test_there_are_no_circles() -> None:
    circular = [module for module in imports() if module != "quantkit" and module in reachable(module)]
    assert circular == []


def test_files_are_short() -> None:
    lines = {path: len((PACKAGE / path).read_text(encoding="utf-8").splitlines()) for path in trees()}
    assert {path: count for path, count in lines.items() if count > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    long = {
        f"{path}:{node.name}": node.end_lineno - node.lineno + 1
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if not path.startswith(COMPILED)
        and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert long == {}


def test_no_room_outgrows_the_others() -> None:
    """A room is a folder of files; one inside another is a room of its own."""
    lines: Counter[str] = Counter()
    for path in trees():
        lines[Path(path).parent.as_posix()] += len((PACKAGE / path).read_text(encoding="utf-8").splitlines())
    room, count = lines.most_common(1)[0]
    assert count <= MAX_ROOM_SHARE * lines.total(), f"{room} has {count} of {lines.total()} lines"


def test_a_class_name_means_one_thing() -> None:
    """Private names may mean something else in each file: no other file sees them."""
    names: dict[str, list[str]] = {}
    for path, tree in trees().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                names.setdefault(node.name, []).append(path)
    assert {name: paths for name, paths in names.items() if len(paths) > 1} == {}


def strings_of(tree: ast.Module) -> list[tuple[int, str]]:
    """Line and text of string constants that are no docstrings (of attributes neither)."""
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    ]


@pytest.mark.parametrize("path", [path for path in trees() if not path.startswith(KNOW_TENSOR_NAMES)])
def test_only_families_and_runtimes_know_tensor_names(path: str) -> None:
    """Sentences for people may name one as an example."""
    strings = [(line, text) for line, text in strings_of(trees()[path]) if " " not in text.strip()]
    found = [
        f"{path}:{line}: {text!r}"
        for line, text in strings
        if TENSOR_NAMES.search(text) and (path, text) not in KNOW_ONE_NAME
    ]
    assert found == []
