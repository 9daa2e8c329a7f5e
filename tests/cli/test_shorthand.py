"""Conversions without a recipe file, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from quantkit.cli.app import app
from quantkit.cli.options import spread
from quantkit.plan.recipe import Recipe

ROOT = Path(__file__).parent.parent.parent
NANO = ROOT / "examples" / "nano-deepseek-v3"
V3 = ROOT / "examples" / "deepseek-v3-671b"


def quantkit(*words: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="quantkit")


@pytest.mark.parametrize("command", ["convert", "quantize", "plan"])
def test_print_recipe_does_no_work(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = quantkit(command, V3, "--scheme", "w4a16", "--group-size", "-1", "--tokens", "64k", "--print-recipe")
    assert result.exit_code == 0, result.output
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "r.yaml").write_text(result.stdout)
    recipe = Recipe.from_yaml("r.yaml")
    assert recipe.calibration is not None
    assert recipe.calibration.tokens == 64000
    planned = quantkit("plan", V3, "-r", "r.yaml", "--json")
    shorthand = quantkit("plan", V3, "--scheme", "w4a16", "--group-size", "-1", "--tokens", "64k", "--json")
    assert planned.exit_code == shorthand.exit_code == 0
    assert {**json.loads(planned.stdout), "recipe": ""} == {**json.loads(shorthand.stdout), "recipe": ""}
    assert json.loads(shorthand.stdout)["recipe"] == "--scheme w4a16 --group-size -1"


@pytest.mark.parametrize(
    ("words", "spread_words"),
    [
        ("S --data a b c -o x", "S --data a --data b --data c -o x"),
        ("S -o x --data a b", "S -o x --data a --data b"),
        ("S -o x --data a --data b c --tokens 5", "S -o x --data a --data b --data c --tokens 5"),
        ("--data a S -o x", "--data a S -o x"),
        ("S --dry-run --data a b", "S --dry-run --data a --data b"),
        ("S --group-size -1 T", "S --group-size -1 T"),
    ],
)
def test_data_takes_all_words_up_to_the_next_option(words: str, spread_words: str) -> None:
    assert spread(words.split(), {"--data", "-o", "--tokens", "--group-size"}) == spread_words.split()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (
            ("--scheme", "w4a17"),
            1,
            "is no scheme (did you mean w4a16?), needed one of w4a16, w8a16, w2a16",
        ),
        (("--scheme", "w9a16"), 1, "w6a16, w7a16, each also with -all"),
        (("--scheme", "w4a16", "--method", "gtpq"), 1, "--method gtpq: is no method (did you mean gptq?), needed gptq"),
        (("--preset", "Q4_K_N"), 1, "(did you mean Q4_K_"),
        (("--scheme", "w4a16", "--context", "128"), 1, "--context 128: is the sequence that --gpus must fit, and no"),
        (("--scheme", "nf4"), 1, "error: --scheme nf4: is bitsandbytes NF4, which only a recipe's rules write"),
        (("--scheme", "w4a16", "-r", "nano-demo"), 1, "error: found --recipe and --scheme"),
        (("--data", "a.txt", "-r", "nano-demo"), 1, "error: found --recipe and --data"),
        (("--tokens", "5", "-r", "nano-demo"), 1, "error: found --recipe and --tokens"),
        (("--scheme", "w4a16", "--data", "none.txt", "more.txt"), 1, "none.txt"),
        (("--method", "gptq"), 2, "Missing option"),
        (("--scheme", "w4a16", "--tokens", "many"), 2, "needed a number such as"),
        (("--scheme", "w4a16", "--group-size", "many"), 2, "--group-size"),
    ],
    ids=str,
)
def test_refusals_are_one_line(words: tuple[str, ...], code: int, said: str) -> None:
    result = quantkit("plan", NANO, *words)
    assert result.exit_code == code
    assert said in result.stderr
    assert result.stdout == ""
    assert sum(line.startswith("error:") for line in result.stderr.splitlines()) <= 1


def test_convert_needs_a_folder_to_write() -> None:
    result = quantkit("convert", NANO, "--scheme", "w4a16")
    assert result.exit_code == 2
    assert "Missing option '--out' / '-o'" in result.stderr


def test_a_scheme_converts(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for name in ("a", "b"):
        (text / f"{name}.txt").write_bytes((ROOT / "calibration_data" / "eval" / "techdoc.txt").read_bytes()[:60_000])
    out = tmp_path / "out"
    files = sorted(text.glob("*.txt"))
    result = quantkit("quantize", NANO, "--scheme", "w4a16", "--data", *files, "--tokens", "4Ki", "-o", out)
    assert result.exit_code == 0, result.output
    document = json.loads((out / "quantkit.json").read_text())
    assert [entry["rows"] for entry in document["calibration"]] == [1, 1]
    assert {size["stored_as"] for size in document["contents"]} >= {"int4 g128 gptq", "int8 g128 gptq", "dropped"}


def test_what_is_dropped_and_taken_otherwise_is_told(tmp_path: Path) -> None:
    """By plan after its summary, by convert before its work."""
    model = NANO
    plan = quantkit("plan", model, "--scheme", "w4a16", "--method", "rtn")
    lines = plan.stdout.splitlines()
    mtp = next(line for line in lines if "leaves out the MTP layer of the source (" in line)
    assert mtp.startswith("note: output w4a16: ")
    assert 'A recipe keeps it by {match: "role:mtp", keep: source}' in mtp
    notes = [line for line in lines if line.startswith("note: ")]
    assert lines[1].startswith("summary w4a16: ")
    assert f"        {len(notes)} notes at the end" in lines[:6]
    assert notes == lines[-len(notes) :]
    done = quantkit("convert", model, "--scheme", "w4a16", "--method", "rtn", "-o", tmp_path / "out")
    assert [line for line in done.stderr.splitlines() if line.startswith("note: ")] == notes
    gguf = quantkit("plan", model, "--preset", "Q8_0", "--method", "rtn")
    assert "A recipe keeps it by mtp: keep (--print-recipe writes one)." in gguf.stdout


@pytest.mark.parametrize("command", ["plan", "convert"])
def test_gguf_needs_a_config(command: str, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    for source in (file, tmp_path):
        done = quantkit(command, source, "--scheme", "w4a16", *(("-o", tmp_path / "x") if command == "convert" else ()))
        assert done.exit_code == 1
        assert done.stderr.splitlines() == [
            f"error: {tmp_path / 'config.json'}: no such file; GGUF has no config.json and no tokenizer files.",
            "hint: Give --config DIR: the folder of the original's config.json and tokenizer.",
        ]


def test_a_folder_that_restart_would_not_replace_gets_another_hint(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").touch()
    done = quantkit("convert", NANO, "--scheme", "w4a16", "--method", "rtn", "-o", tmp_path / "docs")
    assert done.stderr.splitlines() == [
        f"error: {tmp_path / 'docs'}: exists already, and is no folder that quantkit made: it holds index.md.",
        "hint: Choose another -o, or remove it yourself.",
    ]
