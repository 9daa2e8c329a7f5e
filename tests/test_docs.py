"""README.md and docs/ do what they say: blocks are run, shown output is compared, links lead somewhere.

A page is a session: its blocks run in order in one folder that looks like a checkout.

    ```bash        commands, which must succeed
    ```console     "$ command" lines and what they print; "..." stands for any lines, and for any end of a line.
                   A command may fail if it is shown to print "error:"
    ```python      run in the same folder; later blocks of the page know the names of earlier ones
    <!-- file: NAME -->      before a block: it is that file
    <!-- output varies -->   before a console block: run, not compared
    <!-- not run: why -->    before a block: of quantkit commands only the options are checked
    <!-- transcript -->      before a block of README.md: what `make demo` ends with, compared by its labels
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import Result
from typer.testing import CliRunner

from quantkit.cli.app import app
from quantkit.quantizers import Gptq
from quantkit.runtimes.llama_cpp.presets import FILE_TYPES, fitting_type
from quantkit.schemes.ggml.types import BLOCK_TYPES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"(?:^<!-- (?P<directive>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
LINKED = ("examples", "calibration_data", "docs")
GROUPS = ("calibration", "recipes")
"""Commands that have commands of their own."""
RUNTIMES = {"transformers": ("transformers", "compressed_tensors"), "xllamacpp": ("xllamacpp",)}
"""Word in a python block -> what must be installed to run it: no Python 3.10 has them all."""


@dataclass(frozen=True)
class Block:
    """A fenced block. `where` is page:line, for messages."""

    where: str
    directive: str
    language: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    content = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(content):
        line = content.count("\n", 0, found.start("text"))
        yield Block(f"{page.name}:{line}", found["directive"] or "", found["language"], found["text"])


def ids(page: Path) -> str:
    return page.name


# ------------------------------------------------------------------------------------------------------- the session


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder like a checkout, whose recipes ask for little text."""
    for name in LINKED:
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "recipes").mkdir()
    for path in (ROOT / "recipes").glob("*.yaml"):
        (tmp_path / "recipes" / path.name).write_text(short(path.read_text(encoding="utf-8")), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    # Convert by one thread: the pages' models are small, and other tests may be at work.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def short(recipe: str) -> str:
    recipe = re.sub(r"tokens: \d+, sequence_length: \d+", "tokens: 2048, sequence_length: 256", recipe)
    return re.sub(r"max_windows_per_file: \d+", "max_windows_per_file: 1", recipe)


def run(command: str) -> Result | subprocess.CompletedProcess[str]:
    """Run a command line: quantkit in this process, whatever else in a shell."""
    words = shlex.split(command, comments=True)
    if words[0] == "quantkit":
        return CliRunner().invoke(app, words[1:])
    return subprocess.run(command, shell=True, capture_output=True, text=True, check=False)


def outcome(result: Result | subprocess.CompletedProcess[str]) -> tuple[int, str]:
    """Exit code and all that was printed, errors last."""
    if isinstance(result, subprocess.CompletedProcess):
        return result.returncode, result.stdout + result.stderr
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout + result.stderr


def commands(block: Block) -> list[tuple[str, list[str]]]:
    """Each command of a block with the lines shown to follow it."""
    joined = block.text.replace("\\\n", " ")
    found: list[tuple[str, list[str]]] = []
    for line in joined.splitlines():
        if block.language == "console" and not line.startswith("$ "):
            found[-1][1].append(line)
        elif line.strip():
            found.append((line.removeprefix("$ "), []))
    return found


def matches(shown: list[str], printed: str) -> bool:
    """Whether the shown lines are the printed ones, "..." standing for any lines or any rest of a line."""
    pattern = ""
    for line in shown:
        if line == "...":
            pattern += r"(?:[^\n]*\n)*?"
        elif line.endswith("..."):
            pattern += re.escape(line[:-3].rstrip()) + r"[^\n]*\n"
        else:
            pattern += re.escape(line.rstrip()) + r"\s*\n"
    text = "".join(f"{line.rstrip()}\n" for line in printed.splitlines())
    # What comes after the last shown line need not be shown.
    return re.match(pattern, text) is not None


def run_block(block: Block) -> None:
    for command, shown in commands(block):
        code, printed = outcome(run(command))
        fails = any(line.startswith("error:") for line in shown)
        assert code == fails, f"{block.where}: {command}: exit {code}\n{printed}"
        if shown and block.directive != "output varies":
            assert matches(shown, printed), f"{block.where}: {command} prints\n{printed}"


def run_python(block: Block, names: dict[str, object]) -> list[str]:
    """The packages that were missing; then the block did not run."""
    needed = [package for word, packages in RUNTIMES.items() if word in block.text for package in packages]
    missing = [package for package in needed if find_spec(package) is None]
    if missing:
        return missing
    code = compile(block.text, block.where, "exec")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # other packages' deprecations are not the reader's
        exec(code, names)
    return []


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_blocks_of_a_page_run(page: Path, session: Path) -> None:
    missing: list[str] = []
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.directive.startswith("file: "):
            (session / block.directive.removeprefix("file: ")).write_text(block.text, encoding="utf-8")
        elif block.directive.startswith("not run: "):
            check_options(block)
        elif block.language in ("bash", "console"):
            run_block(block)
        elif block.language == "python":
            missing += run_python(block, names)
        else:
            assert block.language == "", f"{block.where}: nothing checks a block of {block.language!r}"
    if missing:
        pytest.skip(f"all blocks ran but those that need {', '.join(missing)}")


def check_options(block: Block) -> None:
    """The quantkit commands of a block that is not run exist, and have the options that are given."""
    for command, _ in commands(block):
        words = shlex.split(command, comments=True)
        if "quantkit" not in words:
            continue
        arguments = words[words.index("quantkit") + 1 :]
        name = arguments[: 2 if arguments[0] in GROUPS else 1]
        known = CliRunner().invoke(app, [*name, "--help"])
        assert known.exit_code == 0, f"{block.where}: no command {' '.join(name)}"
        for option in (word for word in arguments if word.startswith("-")):
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", known.stdout), f"{block.where}: no {option}"


# ------------------------------------------------------------------------------------------------- what pages promise


def test_the_transcript_of_the_demo_has_the_labels_of_the_report(session: Path) -> None:
    (shown,) = [block for block in blocks(ROOT / "README.md") if block.directive == "transcript"]
    command = "quantkit convert examples/nano-deepseek-v3 -r recipes/nano-demo.yaml -o demo-out --restart"
    assert command in (ROOT / "Makefile").read_text(encoding="utf-8")
    result = run(command)
    assert outcome(result)[0] == 0
    table, _, following = result.stdout.partition("\nnext:\n")
    assert labels(table) == labels(shown.text)
    for line in following.splitlines():
        if shlex.split(line)[0] != "vllm":
            assert outcome(run(line.strip()))[0] == 0, line


def labels(table: str) -> list[str]:
    """The first column of a report, without progress lines."""
    lines = table[table.index("w4a16  ") :].splitlines()
    return [re.split(r"\s{2,}", line)[0].strip("-") for line in lines if line]


def test_the_limits_of_the_demo_stop_a_broken_quantiser(session: Path) -> None:
    recipe = yaml.safe_load((session / "recipes" / "nano-demo.yaml").read_text(encoding="utf-8"))
    for rule in recipe["outputs"][0]["rules"]:
        if rule["match"] == "role:expert":
            rule["scheme"]["bits"] = 2
        if "method" in rule:
            rule["method"] = {"kind": "rtn"}
    del recipe["calibration"]
    (session / "broken.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    code, printed = outcome(run("quantkit convert examples/nano-deepseek-v3 -r broken.yaml -o broken"))
    assert code == 1
    assert "EXCEEDED" in printed


def test_the_limits_of_the_gguf_demo_stop_a_broken_quantiser(session: Path) -> None:
    recipe = yaml.safe_load((session / "recipes" / "nano-gguf.yaml").read_text(encoding="utf-8"))
    recipe["outputs"][0]["preset"] = "Q2_K"
    del recipe["calibration"]
    (session / "broken.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    code, printed = outcome(run("quantkit convert examples/nano-deepseek-v3 -r broken.yaml -o broken"))
    assert code == 1
    assert "EXCEEDED" in printed


def test_the_switches_of_gptq_that_a_page_names_exist() -> None:
    page = (ROOT / "docs" / "write-a-recipe.md").read_text(encoding="utf-8")
    table = page[page.index("| to switch off |") :].split("\n\n")[0]
    switches = [yaml.safe_load(text) for text in re.findall(r"`([^`]+: [^`]+)`", table)]
    assert len(switches) > 5
    for switch in switches:
        Gptq.model_validate(switch)


def test_pages_list_the_types_and_presets_that_there_are() -> None:
    page = (ROOT / "docs" / "gguf.md").read_text(encoding="utf-8")
    (presets,) = re.findall(r"^Presets: (.*?)\n\n", page, re.MULTILINE | re.DOTALL)
    assert sorted(re.findall(r"`(\w+)`", presets)) == sorted(FILE_TYPES)
    bits: dict[str, float] = {}
    for names, values in re.findall(r"^\| ((?:I?Q\d|MXFP)[\w, ]*) \| ([\d., ]+) \| [\d, ]+ \|", page, re.MULTILINE):
        each = [float(value) for value in values.split(",")]
        kinds = names.split(", ")
        bits |= dict(zip(kinds, each * len(kinds) if len(each) == 1 else each, strict=True))
    assert {kind: block.bpw for kind, block in BLOCK_TYPES.items()} == pytest.approx(bits, abs=0.006)
    for path in (ROOT / "README.md", ROOT / "CHANGELOG.md"):
        content = path.read_text(encoding="utf-8")
        assert all(re.search(rf"\b{kind}\b", content) for kind in BLOCK_TYPES), path.name
    for kind, layout in re.findall(r"^\| (\w+) \(\d+\) \| (\d+, \d+) \|", formats_page(), re.MULTILINE):
        assert layout == f"{BLOCK_TYPES[kind].block}, {BLOCK_TYPES[kind].nbytes}", kind


def formats_page() -> str:
    return (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")


def test_types_for_short_rows_are_as_a_page_says() -> None:
    page = (ROOT / "docs" / "gguf.md").read_text(encoding="utf-8")
    rows = page[page.index("| wanted | taken |") :].split("\n\n")[0].splitlines()[2:-1]
    for row in rows:
        wanted, taken = (cell.strip().split(", ") for cell in row.strip("|").split("|"))
        assert [fitting_type(kind, 96) for kind in wanted] == (taken if len(taken) > 1 else taken * len(wanted))


def test_sizes_of_v3_are_those_of_the_recipes() -> None:
    page = (ROOT / "docs" / "convert-deepseek-v3.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(deepseek-v3-[\w-]+)` \|.*\| ([\d.]+ GB) \| ([\d.]+) \|", page, re.MULTILINE)
    recipes = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "recipes").glob("deepseek-v3-*.yaml")}
    assert {name for name, *_ in shown} == set(recipes)
    for name, size, bpw in shown:
        assert re.search(rf"^# size:  {size} .*, {bpw} bits per weight$", recipes[name], re.MULTILINE), name


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=ids)
def test_links_lead_somewhere(page: Path) -> None:
    content = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", content):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        linked = page if not path else (page.parent / path)
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_reachable_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(docs/([^)\s#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")))
    linked |= set(re.findall(r"\]\(([^)\s#]+)\)", (ROOT / "docs" / "index.md").read_text(encoding="utf-8")))
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert pages - {"index.md"} <= linked


def test_every_command_and_option_is_in_the_reference() -> None:
    import typer

    reference = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    group = typer.main.get_command(app)
    todo = [("quantkit", group)]
    while todo:
        name, command = todo.pop()
        assert f"## {name}\n" in reference, name
        section = reference.split(f"## {name}\n")[1].split("\n## ")[0]
        for parameter in command.params:
            for option in [*parameter.opts, *parameter.secondary_opts]:
                assert not option.startswith("-") or option in section, f"{name} {option}"
        todo += [(f"{name} {sub}", inner) for sub, inner in getattr(command, "commands", {}).items()]
