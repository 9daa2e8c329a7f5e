"""The command line as a user meets it: exit codes, one-line errors, clean JSON, speed of what must be fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from quantkit import api
from quantkit.cli.app import app
from quantkit.version import __version__
from tests.convert.recipes import INT4, KEEP_REST, recipe_text
from tests.inspect.gguf_files import tiny_file, write_file
from tests.tiny_models import tiny_config, write_checkpoint

ROOT = Path(__file__).parent.parent.parent
V3 = ROOT / "examples" / "deepseek-v3-671b"
COMMANDS = ([], ["convert"], ["plan"], ["inspect"], ["recipes"], ["recipes", "list"], ["recipes", "show"], ["docs"])


def quantkit(*words: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="quantkit")


def subprocess_of(*words: object, **options: Any) -> subprocess.Popen[str]:
    """Run a command as its own process, with the real entry point."""
    code = "import sys; from quantkit.cli.app import main; sys.argv[0] = 'quantkit'; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help(words: list[str]) -> None:
    result = quantkit(*words, "--help")
    assert result.exit_code == 0
    assert "Usage: quantkit" in result.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["convert"], "Missing argument"),
        (["plan", "x"], "Missing option"),
        (["frobnicate"], "No such command"),
        (["plan", "x", "-r", "y", "--gpus", "5 A100"], "needed COUNTxNAME-SIZEGB"),
        (["plan", "x", "-r", "y", "--context", "0"], "Invalid value for '--context'"),
        (["convert", "x", "-r", "y", "-o", "z", "--memory-budget", "20 bananas"], "needed a number with B, KB, MB"),
        (["convert", "x", "-r", "y", "-o", "z", "--memory-budget", "1MB"], "needed at least 256MiB"),
        (["convert", "x", "-r", "y", "-o", "z", "--device", "tpu"], "'tpu' is not one of"),
        (["convert", "x", "-r", "y", "-o", "z", "--jobs", "0"], "Invalid value for '--jobs'"),
    ],
)
def test_wrong_usage_is_2(words: list[str], said: str) -> None:
    result = quantkit(*words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stdout == ""


def test_refusals_are_lines_on_stderr(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(recipe_text(KEEP_REST).replace("version: 1", "version: 7\nverbose: 1"))
    result = quantkit("plan", V3, "-r", bad)
    assert result.exit_code == 1
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[0] == f"error: {bad}:1: version: found 7, needed one of the allowed values (allowed: 1)."
    assert lines[1].startswith(f"error: {bad}:2: verbose: found an unknown key")
    assert [line.split(":")[0] for line in lines] == ["error", "error", "hint"]
    for words in (
        ("plan", tmp_path / "none", "-r", "nano-demo"),
        ("plan", V3, "-r", "no-such-recipe"),
        ("inspect", tmp_path),
        ("recipes", "show", "no-such-recipe"),
        ("convert", tmp_path / "none", "-r", "nano-demo", "-o", tmp_path / "out", "--dry-run"),
    ):
        result = quantkit(*words)
        assert result.exit_code == 1, words
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert "Traceback" not in result.stderr


def copy_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((ROOT / "examples" / "nano-deepseek-v3" / name).read_bytes())


def test_plan_text_and_json(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", tiny_config(num_nextn_predict_layers=0, vocab_size=1280), fp8=True)
    copy_tokenizer(tmp_path / "source")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(recipe_text(f'{{match: "role:expert", {INT4}}}', KEEP_REST).replace("524288", "8192"))
    words = ("plan", tmp_path / "source", "-r", recipe, "--gpus", "1xT4-16GB", "--context", "128")
    text = quantkit(*words)
    assert text.exit_code == 0
    assert "int4 g128 gptq" in text.stdout
    assert "vllm serve OUT --max-num-seqs" in text.stdout
    assert text.stderr == ""
    result = quantkit(*words, "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    document = json.loads(result.stdout)
    (output,) = document["outputs"]
    assert sum(role["nbytes"] for role in output["roles"]) == output["nbytes"]
    assert document["source"]["has_shards"] is True
    assert document["fit"][0]["fits"] is True
    dry = quantkit("convert", tmp_path / "source", "-r", recipe, "-o", tmp_path / "out", "--dry-run", "--json")
    assert {**json.loads(dry.stdout), "fit": document["fit"]} == document
    assert not (tmp_path / "out").exists()


def test_plan_refuses_what_convert_would_refuse(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", tiny_config(num_nextn_predict_layers=0, vocab_size=1280), fp8=True)
    recipe = tmp_path / "r.yaml"
    text = recipe_text(f'{{match: "role:expert", {INT4}}}', KEEP_REST).replace("524288", "8192")
    recipe.write_text(text)
    plan = ("plan", tmp_path / "source", "-r", recipe)
    dry = ("convert", *plan[1:], "-o", tmp_path / "out", "--dry-run")

    def refused(*more: object) -> str:
        for words in (plan, dry):
            found = quantkit(*words, *more)
            assert found.exit_code == 1
        return found.stderr

    assert "tokenizer.json: no such file" in refused()
    copy_tokenizer(tmp_path / "source")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "short.txt").write_text("short")
    recipe.write_text(text.replace("builtin:mixed", "latin.txt"))
    assert "latin.txt: is not UTF-8 (byte 0xe9 at offset 3)" in refused()
    recipe.write_text(text.replace("builtin:mixed", "short.txt"))
    assert "the text holds 0 in whole rows" in refused()
    recipe.write_text(text + "validation: {text: [short.txt], context: 64}\n")
    assert "short.txt: holds 3 tokens, one window needs 63" in refused()
    recipe.write_text(text.replace("builtin:mixed", "builtin:mixd"))
    assert "builtin:mixd: no such built-in text" in refused()
    recipe.write_text(text)
    assert quantkit(*plan, "--memory-budget", "1GiB").exit_code == 0
    recipe.write_text(Path(ROOT / "recipes" / "deepseek-v3-w4a16-gptq.yaml").read_text())
    plan = ("plan", ROOT / "examples" / "deepseek-v3-671b", "-r", recipe)
    dry = ("convert", *plan[1:], "-o", tmp_path / "out", "--dry-run")
    assert "needs at least 5.38 GiB beside the interpreter's 430 MB" in refused("--memory-budget", "1GiB")


def test_a_sequence_is_no_longer_than_the_model_is_made_for() -> None:
    plan = ("plan", ROOT / "examples" / "nano-deepseek-v3", "-r", "nano-demo", "--gpus", "1xH100", "--json")
    (fit,) = json.loads(quantkit(*plan).stdout)["fit"]
    assert fit["context"] == 2048
    assert quantkit(*plan, "--context", "4096").exit_code == 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_plan_of_v3_is_small() -> None:
    """At the true size <= 600 MB. VmHWM, because the peak that getrusage reports of a child begins with its
    parent's."""
    code = (
        "import sys; from quantkit.cli.app import main; sys.argv[0] = 'quantkit'\n"
        "try:\n    main()\n"
        "finally:\n"
        "    peak = [line for line in open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1]\n"
        "    print(peak, file=sys.stderr)"
    )
    words = ["plan", V3, "-r", "deepseek-v3-w4a16-gptq", "--json"]
    api.plan(V3, "deepseek-v3-w4a16-gptq", hours=True)  # from now on this machine's speed is known
    found = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], cwd=ROOT, text=True, capture_output=True, check=True
    )
    assert float(found.stderr) < 600_000
    assert json.loads(found.stdout)["outputs"][0]["nbytes"] == 356_487_744_128


def test_torch_is_loaded_only_by_convert(tmp_path: Path) -> None:
    model = write_file(tmp_path / "tiny.gguf", *tiny_file())
    code = (
        "import sys; from typer.testing import CliRunner; from quantkit.cli.app import app\n"
        "run = lambda *words: CliRunner().invoke(app, words).exit_code\n"
        f"assert run('plan', {str(V3)!r}, '-r', 'nano-demo') == 0\n"
        "assert run('recipes', 'list') == run('convert', '--help') == 0\n"
        f"assert run('inspect', {str(model)!r}) == 0\n"
        "assert 'torch' not in sys.modules, 'torch'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=600)


def test_recipes(tmp_path: Path) -> None:
    listed = json.loads(quantkit("recipes", "list", "--json").stdout)
    assert {"nano-demo", "deepseek-v3-w4a16-gptq"} <= {entry["name"] for entry in listed}
    assert "nano-demo" in quantkit("recipes", "list").stdout
    assert quantkit("recipes").stdout == quantkit("recipes", "list").stdout
    shown = quantkit("recipes", "show", "nano-demo").stdout
    assert shown == (ROOT / "recipes" / "nano-demo.yaml").read_text(encoding="utf-8")
    schema = json.loads(quantkit("recipes", "schema").stdout)
    assert schema == json.loads((ROOT / "docs" / "recipe.schema.json").read_text(encoding="utf-8"))


def test_inspect(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config(num_nextn_predict_layers=0), fp8=True)
    text = quantkit("inspect", tmp_path)
    assert text.exit_code == 0
    assert "fp8 block" in text.stdout
    assert "nothing unusual" in text.stdout
    document = json.loads(quantkit("inspect", tmp_path, "--json").stdout)
    assert document["quantization"] == "fp8"
    assert document["unusual"] == []
    (tmp_path / "model-00002-of-000003.safetensors").write_bytes(b"\xff" * 20)
    broken = quantkit("inspect", tmp_path)
    assert broken.exit_code == 1
    assert "model-00002-of-000003.safetensors" in broken.stderr


def test_closed_pipe_is_quiet() -> None:
    process = subprocess_of("plan", V3, "-r", "nano-demo")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    assert process.wait() != 0


def test_version() -> None:
    done = quantkit("--version")
    assert (done.exit_code, done.stdout) == (0, f"quantkit {__version__}\n")
    assert f'\nversion = "{__version__}"\n' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
