"""The command line as a user meets it: exit codes, one-line errors, clean JSON, speed of what must be fast."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from quantkit import api
from quantkit.cli.app import app
from quantkit.convert.events import (
    CopyDone,
    ExpertTokenStats,
    Finished,
    LayerDone,
    OutputReport,
    Report,
    StageStarted,
    Started,
    TensorDone,
    ValidationProgress,
)
from quantkit.documents.conversion import ValidationResult, ValidationScores
from quantkit.documents.values import Mean
from quantkit.errors import OutputError
from quantkit.plan.recipe import Recipe
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


# --- convert, with the conversion replaced


def report(problems: tuple[str, ...] = ()) -> Report:
    scores = ValidationScores(
        windows=8,
        tokens=2048,
        reference_perplexity=Mean(mean=10.0, standard_error=0.5),
        candidate_perplexity=Mean(mean=10.1, standard_error=0.5),
        perplexity_ratio=Mean(mean=1.01, standard_error=0.001),
        mean_kl=Mean(mean=0.0123, standard_error=0.0011),
        median_kl=0.01,
        p99_kl=0.2,
        top1=Mean(mean=0.953, standard_error=0.004),
    )
    output = OutputReport(
        "w4a16",
        Path("out"),
        8_075_088,
        6.33,
        195,
        150,
        2,
        ValidationResult(output="w4a16", scores=scores, problems=problems),
    )
    return Report(
        outputs=(output,),
        seconds={"layers": 12.5, "validation": 3.0},
        peak_rss_bytes=900_000_000,
        tokens=32768,
        expert_tokens=ExpertTokenStats(24, 10, 8000, 20000, 0, 1),
        resumed=False,
        validated=not problems,
    )


@pytest.fixture
def converts_to(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], dict[str, Any]]:
    """Replace the conversion by a function; returns what it was called with."""

    def replace_by(result: Any) -> dict[str, Any]:
        called: dict[str, Any] = {}

        def convert(source: Path, recipe: str, out: Path, **options: Any) -> Report:
            called.update(options, source=source, recipe=recipe, out=out)
            if isinstance(result, BaseException):
                raise result
            for event in (
                Started(2, 10**9, 32768, 0),
                StageStarted("experts", 0, 12),
                TensorDone("a.weight", 0.01, 10**6),
                LayerDone(0, 2.0, 32768),
                CopyDone(3, 10**6),
                LayerDone(1, 2.0, 32768),
                ValidationProgress(1, 2),
                ValidationProgress(2, 2),
                Finished(result),
            ):
                options["on_event"](event)
            return result

        monkeypatch.setattr(api, "convert", convert)
        return called

    return replace_by


ConvertsTo = Callable[[Any], dict[str, Any]]


def test_convert_reports(converts_to: ConvertsTo, tmp_path: Path) -> None:
    called = converts_to(report())
    options = ("--memory-budget", "2GiB", "--jobs", "2", "--device", "cpu")
    result = quantkit("convert", V3, "-r", "nano-demo", "-o", tmp_path / "out", *options)
    assert result.exit_code == 0
    assert (called["memory_budget"], called["jobs"], called["device"], called["restart"]) == (2**31, 2, "cpu", False)
    assert called["recipe"] == Recipe.from_yaml("nano-demo")
    for said in (
        "10.0000 ± 0.5000",
        "0.01230 ± 0.00110 nats",
        "95.30% ± 0.40%",
        "6.330",
        "8.08 MB (7.70 MiB)",
        "900.0 MB",
    ):
        assert said in result.stdout, said
    following = [line.split("  #")[0].strip() for line in result.stdout.partition("next:\n")[2].splitlines()]
    assert following == [
        "cat out/README.md",
        f"quantkit evaluate {V3} out -o out.evaluation.json",
        "quantkit report out out.evaluation.json -o out.html",
    ]
    progress = result.stderr.splitlines()
    assert progress[0] == "2 layers, 1.00 GB to read, 32,768 calibration tokens"
    assert progress[1].startswith("layer 1/2  50 %  16,384 tokens/s")
    assert "ETA" in progress[1]
    assert progress[-1].startswith("layer 2/2  validation 2/2  100 %")


def test_convert_json_is_one_document(converts_to: ConvertsTo, tmp_path: Path) -> None:
    converts_to(report())
    result = quantkit("convert", V3, "-r", "nano-demo", "-o", tmp_path / "out", "--json", "--restart")
    document = json.loads(result.stdout)
    assert document["outputs"][0]["validation"]["mean_kl"] == {"mean": 0.0123, "standard_error": 0.0011}
    assert document["validated"] is True
    assert document["seconds"]["total"] == 15.5


def test_convert_over_its_limits_is_1(converts_to: ConvertsTo, tmp_path: Path) -> None:
    failed = report(("mean KL divergence is 0.01230, the recipe allows 0.01000",))
    converts_to(replace(failed, outputs=(replace(failed.outputs[0], serve=("vllm serve out",)),)))
    result = quantkit("convert", V3, "-r", "nano-demo", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "EXCEEDED" in result.stdout
    assert "vllm serve" not in result.stdout
    assert result.stderr.splitlines()[-3:] == [
        "error: out: mean KL divergence is 0.01230, the recipe allows 0.01000",
        "error: limits of the recipe exceeded: the result is kept, and marked as not validated.",
        "hint: Use more bits or more calibration text, or raise the recipe's limits.",
    ]


def test_convert_refused_is_1(converts_to: ConvertsTo, tmp_path: Path) -> None:
    converts_to(OutputError("out: exists already.", hint="Choose another -o."))
    result = quantkit("convert", V3, "-r", "nano-demo", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-2:] == ["error: out: exists already.", "hint: Choose another -o."]


def begun(out: Path) -> None:
    """Leave what a job for OUT leaves that was stopped after it began."""
    partial = out.with_name(f"{out.name}.partial")
    partial.mkdir()
    (partial / "journal.jsonl").touch()


def test_convert_interrupted_before_it_began_has_nothing_to_resume(converts_to: ConvertsTo, tmp_path: Path) -> None:
    converts_to(KeyboardInterrupt())
    result = quantkit("convert", V3, "-r", "nano-demo", "-o", tmp_path / "out")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted. Nothing was begun: nothing is to be resumed or removed."


def test_convert_interrupted_is_130(converts_to: ConvertsTo, tmp_path: Path) -> None:
    converts_to(KeyboardInterrupt())
    begun(tmp_path / "out put")
    result = quantkit("convert", V3, "-r", "nano-demo", "-o", tmp_path / "out put")
    assert result.exit_code == 130
    resume = f"quantkit convert {V3} -r nano-demo -o '{tmp_path}/out put'"
    assert result.stderr.splitlines()[-1] == f"interrupted. Resume with: {resume}"


def test_our_own_bugs_keep_their_traceback(converts_to: ConvertsTo, tmp_path: Path) -> None:
    converts_to(ZeroDivisionError("bug"))
    result = quantkit("convert", V3, "-r", "nano-demo", "-o", tmp_path / "out")
    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.skipif(not hasattr(signal, "SIGTERM"), reason="needs POSIX signals")
def test_sigterm_is_130_and_says_how_to_resume(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from quantkit import api\n"
        "def convert(*a, **k):\n    print('ready', flush=True); time.sleep(600)\n"
        "api.convert = convert\n"
        "from quantkit.cli.app import main; sys.argv[0] = 'quantkit'; main()"
    )
    words = ["convert", str(V3), "-r", "nano-demo", "-o", str(tmp_path / "o"), "--restart", "--jobs", "2"]
    begun(tmp_path / "o")
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == (
        f"interrupted. Resume with: quantkit convert {V3} -r nano-demo -o {tmp_path / 'o'} --jobs 2"
    )


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
