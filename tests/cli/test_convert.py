"""`quantkit convert` as a user meets it, with the conversion replaced: reports, exit codes, interruptions."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantkit import api
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
from tests.cli.test_cli import ROOT, V3, quantkit


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
