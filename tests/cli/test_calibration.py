"""`quantkit calibration build` as it is typed, and what is done with its set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import quantkit as package
from quantkit.cli.app import app
from quantkit.documents.conversion import ConversionDocument

ROOT = Path(__file__).parent.parent.parent
NANO = ROOT / "examples" / "nano-deepseek-v3"
TEXT = ROOT / "calibration_data" / "mixed"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def quantkit(*words: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="quantkit")


def build(*words: object) -> Result:
    return quantkit("calibration", "build", *words)


def test_from_files_to_a_checkpoint(tmp_path: Path) -> None:
    """The words that `build` prints plan and convert, and all of the set is used."""
    made = build(*TEXT.iterdir(), "--tokens", "8Ki", "--tokenizer", NANO, "--sequence-length", 512)
    assert made.exit_code == 0, made.output
    manifest = json.loads(Path("calibration.manifest.json").read_text(encoding="utf-8"))
    assert {one["domain"] for one in manifest["contents"]} == {path.stem for path in TEXT.iterdir()}
    assert 8192 <= manifest["tokens"] < 8192 + 1500  # nano's tokens are short: 512 x 4 bytes are up to 1,500
    (line,) = [line.strip() for line in made.stdout.splitlines() if line.strip().startswith("calibration:")]
    assert line == "calibration: {data: [calibration.jsonl], tokens: 8192, sequence_length: 512}"
    recipe = (
        f"version: 1\n{line}\noutputs:\n  - name: w4\n    format: compressed-tensors\n    rules:\n"
        '      - {match: "role:mtp", drop: true}\n'
        '      - {match: "role:norm|router|embed|lm_head", keep: source}\n'
        '      - {match: "*", scheme: {kind: int, bits: 4, group_size: 128}}\n'
    )
    Path("own.yaml").write_text(recipe)
    planned = quantkit("plan", NANO, "-r", "own.yaml")
    assert planned.exit_code == 0, planned.output
    assert "text    8,192 tokens: 2,048 an expert on average (3 of 12 take a token)" in planned.stdout
    converted = quantkit("convert", NANO, "-r", "own.yaml", "-o", "out")
    assert converted.exit_code == 0, converted.output
    document = ConversionDocument.model_validate_json(Path("out/quantkit.json").read_text(encoding="utf-8"))
    (text,) = document.calibration
    assert (text.file, text.sha256, text.rows) == ("calibration.jsonl", manifest["sha256"], 16)


def test_the_line_of_a_command_works_as_printed() -> None:
    made = build(TEXT / "prose.txt", TEXT / "chat.jsonl", "--tokens", 4096, "--tokenizer", NANO, "-o", "my set.jsonl")
    (line,) = [line.strip() for line in made.stdout.splitlines() if line.strip().startswith("quantkit convert")]
    assert line == "quantkit convert MODEL -o OUT --scheme w4a16 --data 'my set.jsonl' --tokens 4096"
    assert 'data: ["my set.jsonl"]' in made.stdout
    planned = quantkit("plan", NANO, "--scheme", "w4a16", "--data", "my set.jsonl", "--tokens", 4096)
    assert planned.exit_code == 0, planned.output


def test_what_is_printed() -> None:
    made = build(TEXT / "prose.txt", TEXT / "german.txt", "--tokens", "20k")
    head, table, notes, use = made.stdout.split("\n\n")
    assert head.startswith("calibration.jsonl: ")
    assert head.endswith("tokens (estimated at 4 bytes a token)")
    assert [line.split()[:2] for line in table.splitlines()[2:4]] == [["german", "Latin"], ["prose", "Latin"]]
    assert notes.splitlines()[0].startswith("left out: 0 exact and 0 near duplicates, 0 that share")
    assert "note: no tokenizer counted the tokens" in notes
    assert "asked for" not in notes
    assert "--tokens 18432" in use  # whole rows of 2,048
    assert build(TEXT / "prose.txt").exit_code == 1


def test_fewer_tokens_than_asked_for_are_a_note() -> None:
    made = build(TEXT / "prose.txt", "--json", "--tokens", "1M")
    assert made.exit_code == 0
    document = json.loads(made.stdout)
    assert document["tokens"] < document["tokens_asked"] == 10**6
    again = build(TEXT / "prose.txt", "--tokens", "1M", "--force")
    assert f"1,000,000 tokens were asked for, all that the sources hold is {document['tokens']:,}" in again.stdout


def test_exclude_takes_all_words_up_to_the_next_option() -> None:
    Path("a.txt").write_text((TEXT / "prose.txt").read_text(encoding="utf-8"), encoding="utf-8")
    Path("b.txt").write_text((TEXT / "german.txt").read_text(encoding="utf-8"), encoding="utf-8")
    files = [TEXT / name for name in ("prose.txt", "german.txt", "french.txt")]
    made = build(*files, "--exclude", "a.txt", "b.txt", "--tokens", "1M", "-o", "x.jsonl", "--json")
    assert {one["domain"] for one in json.loads(made.stdout)["contents"]} == {"french"}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "Missing argument 'FILE...'"),
        (("none.txt",), 1, "error: none.txt: no such file"),
        (("empty.txt",), 1, "error: empty.txt: the file is empty"),
        (("good.txt", "-o", "taken.jsonl"), 1, "error: taken.jsonl: exists already"),
        (("good.txt", "-o", "out.txt"), 1, "error: out.txt: found .txt, needed .jsonl"),
        (("good.txt", "--tokenizer", "nowhere"), 1, "tokenizer.json: no such file"),
        (("good.txt", "--tokens", "many"), 2, "needed a number such as"),
        (("good.txt", "--exclude", "none.txt"), 1, "error: none.txt: no such file"),
        (("good.jsonl", "--domain-by", "kind"), 1, "error: good.jsonl:1: found text, needed the key `kind`"),
    ],
    ids=str,
)
def test_refusals_are_one_line_and_write_nothing(words: tuple[str, ...], code: int, said: str) -> None:
    for name, text in (("empty.txt", ""), ("good.txt", "some text"), ("taken.jsonl", "mine")):
        Path(name).write_text(text)
    Path("good.jsonl").write_text('{"text": "some text"}')
    before = sorted(Path().iterdir())
    result = build(*words)
    assert result.exit_code == code
    assert said in result.stderr
    assert result.stdout == ""
    assert sorted(Path().iterdir()) == before
    assert Path("taken.jsonl").read_text() == "mine"


def test_the_function_has_the_options_of_the_command() -> None:
    import inspect

    import typer

    groups = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    command = groups["calibration"].commands["build"]
    options = {option.name for option in command.params} - {"as_json", "help"}
    parameters = inspect.signature(package.build_calibration).parameters
    assert options == set(parameters) - {"on_read"}
    for option in command.params:
        if option.name in parameters and option.name not in ("files", "out", "exclude"):
            assert option.default == parameters[option.name].default, option.name
    made = package.build_calibration(str(TEXT / "prose.txt"), "set.jsonl", tokens=3000)
    assert package.text(made).startswith("set.jsonl: ")
    assert package.document(made)["tokens"] == made.tokens
    with pytest.raises(package.QuantkitError, match="needed at least 1"):
        package.build_calibration(str(TEXT / "prose.txt"), "more.jsonl", tokens=0)
