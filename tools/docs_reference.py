"""Writes what follows from the code: docs/reference/cli.md, docs/reference/recipe.md, docs/recipe.schema.json and the
sizes in recipes/*.yaml.

    python tools/docs_reference.py            write
    python tools/docs_reference.py --check    exit 1 and name the files that are not up to date (a test does the same)
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    "",
    "convert",
    "quantize",
    "plan",
    "inspect",
    "verify",
    "evaluate",
    "sensitivity",
    "check",
    "report",
    "calibration",
    "calibration build",
    "recipes",
    "recipes list",
    "recipes show",
    "recipes schema",
    "docs",
)
V3 = ROOT / "examples" / "deepseek-v3-671b"


def documents() -> Iterator[tuple[Path, str]]:
    """Every generated file with the text it should have."""
    from quantkit.plan.recipe import Recipe
    from quantkit.plan.recipe_file import schema_of

    schema = schema_of(Recipe)
    yield ROOT / "docs" / "recipe.schema.json", json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
    yield ROOT / "docs" / "reference" / "recipe.md", recipe_reference(schema)
    yield ROOT / "docs" / "reference" / "cli.md", cli_reference()
    for path in sorted((ROOT / "recipes").glob("deepseek-v3-*.yaml")):
        yield path, with_sizes(path)


def cli_reference() -> str:
    """Each command's --help."""
    parts = ["# Command line\n\nGenerated from `--help` by `tools/docs_reference.py`.\n"]
    for command in COMMANDS:
        words = ["quantkit", *command.split()]
        parts.append(f"## {' '.join(words)}\n\n```\n{help_text(command.split())}\n```\n")
    parts.append(EXIT_CODES)
    return "\n".join(parts)


EXIT_CODES = """## Exit codes

| code | meaning |
|---|---|
| 0 | done |
| 1 | refused, or the result exceeds the recipe's limits: `error:` lines and a `hint:` on stderr |
| 2 | wrong usage |
| 130 | interrupted (Ctrl-C or SIGTERM); the line on stderr says how to resume |

Results go to stdout, progress and errors to stderr. With `--json`, stdout holds one JSON document and nothing else.
"""


def help_text(words: list[str]) -> str:
    """A command's help, 100 columns wide."""
    os.environ["TERMINAL_WIDTH"] = os.environ["COLUMNS"] = "100"
    from typer.testing import CliRunner

    from quantkit.cli.app import app

    result = CliRunner().invoke(app, [*words, "--help"], prog_name="quantkit", terminal_width=100)
    assert result.exit_code == 0, result.output
    return "\n".join(line.rstrip() for line in result.output.strip().splitlines())


def recipe_reference(schema: dict[str, Any]) -> str:
    """One table for each model of a recipe."""
    models = {"Recipe": {key: value for key, value in schema.items() if key != "$defs"}, **schema["$defs"]}
    assert set(TITLES) == set(models), sorted(models)
    parts = [
        "# Recipe files\n\nGenerated from the models by `tools/docs_reference.py`.\n"
        "Editors complete recipes that begin with\n"
        "`# yaml-language-server: $schema=.../docs/recipe.schema.json` (`quantkit recipes schema` prints the schema).\n"
    ]
    for name in TITLES:
        model = models[name]
        parts.append(f"## {TITLES[name]}\n\n{paragraph(model.get('description', ''))}\n")
        rows = [field_row(key, entry, key in model.get("required", ())) for key, entry in model["properties"].items()]
        parts.append("| key | value | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


TITLES = {
    "Recipe": "The file",
    "Calibration": "`calibration`",
    "Prune": "`prune`",
    "Tune": "`tune`",
    "FolderOutput": "`outputs[]` that are folders of safetensors",
    "GgufOutput": "`outputs[]` with `format: gguf`",
    "OutputTarget": "`outputs[].target`",
    "Rule": "`outputs[].rules[]`",
    "IntScheme": "`scheme: {kind: int}`",
    "GgmlScheme": "`scheme: {kind: ggml}`",
    "Nvfp4Scheme": "`scheme: {kind: nvfp4}`",
    "Mxfp4Scheme": "`scheme: {kind: mxfp4}`",
    "Mxfp8Scheme": "`scheme: {kind: mxfp8}`",
    "W4AFp8Scheme": "`scheme: {kind: w4afp8}`",
    "Bnb4Scheme": "`scheme: {kind: bnb4}`",
    "Rtn": "`method: {kind: rtn}`",
    "Gptq": "`method: {kind: gptq}`",
    "Awq": "`method: {kind: awq}`",
    "Repack": "`method: {kind: repack}`",
    "Validation": "`validation`",
}


def field_row(key: str, entry: dict[str, Any], required: bool) -> str:
    """One key as a row of a table."""
    default = "required" if required else f"`{json.dumps(entry.get('default'), ensure_ascii=False)}`"
    return f"| `{key}` | {value_text(entry)} | {default} | {paragraph(entry.get('description', ''))} |"


def value_text(entry: dict[str, Any]) -> str:
    """What a key may hold, in words."""
    if "$ref" in entry:
        return TITLES[entry["$ref"].rpartition("/")[2]]
    for union in ("anyOf", "oneOf"):
        if union in entry:
            return " or ".join(value_text(part) for part in entry[union])
    if "const" in entry:
        return f"`{json.dumps(entry['const'])}`"
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    if "prefixItems" in entry:
        return f"({', '.join(map(value_text, entry['prefixItems']))})"
    if entry.get("type") == "array":
        return f"list of {value_text(entry['items'])}"
    words = {"integer": "whole number", "string": "text", "boolean": "`true` or `false`", "null": "`null`"}
    return words.get(entry["type"], entry["type"]) + bounds(entry)


def bounds(entry: dict[str, Any]) -> str:
    """The range of a number."""
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    found = [f"{sign} {entry[key]:,}" for key, sign in signs.items() if key in entry]
    return f" ({', '.join(found)})" if found else ""


def paragraph(text: str) -> str:
    """Docstring text on one line, for a table or a paragraph."""
    return re.sub(r"\s+", " ", text).strip().replace("``", "`").replace("|", "\\|")


@lru_cache(maxsize=1)
def v3_headers() -> Any:
    """DeepSeek V3 as its config.json describes it."""
    from quantkit.plan.headers import read_headers

    return read_headers(V3)


def with_sizes(path: Path) -> str:
    """A recipe's text with the `# size:` and `# needs:` lines that a plan of DeepSeek V3 gives."""
    from quantkit.plan.memory import conversion_needs
    from quantkit.plan.plan import make_plan
    from quantkit.plan.recipe import Recipe

    headers = v3_headers()
    plan = make_plan(Recipe.from_yaml(path), headers.arch, headers.infos, headers.stored)
    output, needs = plan.outputs[0], conversion_needs(plan, headers.arch)
    size = f"{output.nbytes / 1e9:.2f} GB ({output.nbytes / 2**30:.2f} GiB), {output.bpw:.3f} bits per weight"
    ram = f"{needs.working_bytes / 1e9:.1f} GB of RAM"
    if needs.hidden_states:
        ram += f" ({needs.ram_bytes / 1e9:.1f} GB with the hidden states in RAM)"
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"(?m)^# size: .*$", f"# size:  {size}", text)
    return re.sub(r"(?m)^# needs: .*$", f"# needs: {ram}, {needs.disk_bytes / 1e9:.0f} GB of disk", text)


def outdated() -> list[Path]:
    """Generated files that differ from what the code says."""
    return [path for path, text in documents() if not path.exists() or path.read_text(encoding="utf-8") != text]


def main() -> None:
    if "--check" in sys.argv[1:]:
        stale = outdated()
        for path in stale:
            print(f"{path.relative_to(ROOT)}: out of date, run python tools/docs_reference.py")
        raise SystemExit(1 if stale else 0)
    for path, text in documents():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
