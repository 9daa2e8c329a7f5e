"""`quantkit check` on the command line: exit codes, lines, files; the ready jobs of docs/ci and action.yml."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from tests.cli.test_cli import quantkit
from tests.convert.jobs import write_model, write_text
from tests.evaluate.evaluations import Made, write

ROOT = Path(__file__).resolve().parents[2]
CLEAN, WORSE = Made(seed=1), Made(seed=2, kld=1.5)


@pytest.fixture(autouse=True)
def _no_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run inside a GitHub job."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    path = tmp_path / "baseline.json"
    done = quantkit("check", write(tmp_path / "first.json", CLEAN), "--baseline", path, "--update-baseline")
    assert (done.exit_code, done.stdout) == (0, f"{path}: is the baseline of int4 now. Commit it.\n")
    return path


def test_a_clean_seed_passes(tmp_path: Path, baseline: Path) -> None:
    done = quantkit("check", write(tmp_path / "e.json", Made(seed=5)), "-b", baseline)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.startswith("int4 ")
    assert done.stdout.endswith("\n\nall 6 checks passed\n")


def test_an_evaluation_is_no_baseline(tmp_path: Path, baseline: Path) -> None:
    made = write(tmp_path / "e.json", CLEAN)
    done = quantkit("check", made, "-b", made)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {made}: is an evaluation, not a baseline.\nhint: Make one of an evaluation")
    done = quantkit("check", baseline, "-b", baseline)
    assert done.stderr.startswith(f"error: {baseline}: is a baseline of `quantkit check`, not an evaluation.\nhint: ")
    done = quantkit("report", baseline)
    assert done.stderr.startswith(
        f"error: {baseline}: is a baseline of `quantkit check`, of which no report is made.\n"
    )


def test_a_regression_fails_with_a_line(tmp_path: Path, baseline: Path) -> None:
    junit, summary = tmp_path / "junit.xml", tmp_path / "summary.md"
    files = ("--junit", junit, "--markdown", summary)
    done = quantkit("check", write(tmp_path / "e.json", WORSE), "-b", baseline, *files)
    assert done.exit_code == 1
    lines = done.stderr.splitlines()
    assert all(line.startswith("error: int4: ") for line in lines)
    assert lines[0].startswith("error: int4: mean KLD got worse: ")
    assert re.search(r"^mean KLD .* WORSE$", done.stdout, re.MULTILINE)
    assert f"{len(lines)} of 6 checks failed" in done.stdout
    assert ElementTree.parse(junit).getroot().get("failures") == str(len(lines))
    assert summary.read_text(encoding="utf-8").startswith("## quantkit check: ")


def test_the_summary_of_a_github_job_is_appended(
    tmp_path: Path, baseline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tmp_path / "step.md"
    step.write_text("before\n", encoding="utf-8")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(step))
    made = write(tmp_path / "e.json", WORSE)
    quantkit("check", made, "-b", baseline)
    assert step.read_text(encoding="utf-8") == "before\n"
    quantkit("check", made, "-b", baseline, "--markdown", tmp_path / "m.md")
    assert step.read_text(encoding="utf-8") == "before\n" + (tmp_path / "m.md").read_text(encoding="utf-8")


def test_limits_are_options(tmp_path: Path, baseline: Path) -> None:
    made = write(tmp_path / "e.json", WORSE)
    assert quantkit("check", made, "-b", baseline, "--spread", "30%", "--sigmas", 10).exit_code == 0
    first = tmp_path / "first.json"
    assert quantkit("check", first, "-b", baseline, "--max-kld", 0.001).exit_code == 1
    assert quantkit("check", first, "-b", baseline, "--max-perplexity-increase", "0.01%").exit_code == 1
    larger = write(tmp_path / "larger.json", Made(seed=1, nbytes=1_100_000))
    assert "size got worse" in quantkit("check", larger, "-b", baseline).stderr
    assert quantkit("check", larger, "-b", baseline, "--max-size-increase", "15%").exit_code == 0
    for wrong in ("-1%", "many", "nan", "inf"):
        done = quantkit("check", made, "-b", baseline, "--spread", wrong)
        assert (done.exit_code, "needed a share" in done.stderr) == (2, True)


def test_refusals_are_no_passes(tmp_path: Path, baseline: Path) -> None:
    first = tmp_path / "first.json"
    other = write(tmp_path / "other.json", CLEAN, tokens_sha256="bb" * 32)
    done = quantkit("check", other, "-b", baseline)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {baseline}: not comparable, another text: ")
    assert len(done.stderr.splitlines()) == 2
    assert "no such baseline" in quantkit("check", first, "-b", tmp_path / "none.json").stderr
    assert "candidate x: is not in the baseline" in quantkit("check", first, "-b", baseline, "--candidate", "x").stderr
    assert "cannot be written" in quantkit("check", first, "-b", baseline, "--junit", tmp_path).stderr
    assert quantkit("check", first).exit_code == 2


def test_the_baseline_moves_when_asked(tmp_path: Path, baseline: Path) -> None:
    made = write(tmp_path / "e.json", WORSE)
    done = quantkit("check", made, "-b", baseline, "--update-baseline")
    assert done.exit_code == 0
    assert "WORSE" in done.stdout
    assert quantkit("check", made, "-b", baseline).exit_code == 0
    both = quantkit("check", made, "-b", baseline, "--update-baseline", "--junit", tmp_path / "j.xml")
    assert (both.exit_code, "<testsuite" in (tmp_path / "j.xml").read_text(encoding="utf-8")) == (0, True)
    one = quantkit("check", made, "-b", baseline, "--update-baseline", "--candidate", "x")
    assert (one.exit_code, "takes no --candidate" in one.stderr) == (1, True)
    other = write(tmp_path / "other.json", CLEAN, tokens_sha256="bb" * 32)
    moved = quantkit("check", other, "-b", baseline, "--update-baseline")
    assert (moved.exit_code, "the old baseline is no comparison: " in moved.stdout) == (0, True)
    assert quantkit("check", other, "-b", baseline).exit_code == 0


# ---------------------------------------------------------------------------------------------------------------- jobs


def scripts(path: Path) -> list[str]:
    """All shell text of a job."""
    document = yaml.safe_load(path.read_text(encoding="utf-8"))

    def found(value: Any) -> list[str]:
        if isinstance(value, dict):
            own = [value["run"]] if isinstance(value.get("run"), str) else []
            own += value["script"] if isinstance(value.get("script"), list) else []
            return own + [text for item in value.values() for text in found(item)]
        return [text for item in value for text in found(item)] if isinstance(value, list) else []

    return found(document)


@pytest.mark.parametrize("name", ["docs/ci/github-actions.yml", "docs/ci/gitlab-ci.yml", "action.yml"])
def test_jobs_use_options_that_there_are(name: str) -> None:
    text = "\n".join(scripts(ROOT / name)).replace("\\\n", " ")
    calls = [shlex.split(line, comments=True)[1:] for line in text.splitlines() if line.startswith("quantkit ")]
    assert calls
    for command, *words in calls:
        known = quantkit(command, "--help").stdout
        given = [word.partition("=")[0] for word in words[: words.index("--") if "--" in words else None]]
        assert all(re.search(rf"(?<![\w-]){word}(?![\w-])", known) for word in given if re.match(r"--?\w", word))


def test_the_workflow_gives_the_action_what_it_takes() -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    workflow = yaml.safe_load((ROOT / "docs" / "ci" / "github-actions.yml").read_text(encoding="utf-8"))
    (given,) = [step["with"] for step in workflow["jobs"]["gate"]["steps"] if step.get("uses", "").startswith("./")]
    inputs = action["inputs"]
    assert set(given) <= set(inputs)
    assert {name for name, entry in inputs.items() if entry.get("required")} <= set(given)
    for step in action["runs"]["steps"]:
        assert "${{" not in step["run"]  # inputs are never text of a script
        assert set(re.findall(r"\binputs\.([\w-]+)", str(step.get("env")))) <= set(inputs)


def test_the_action_runs(tmp_path: Path) -> None:
    """Its scripts in bash as GitHub starts it, on a small model: pass against its own baseline, fail against a better
    one."""
    write_model(tmp_path / "original")
    write_model(tmp_path / "-fp8", fp8=True)  # no option
    write_model(tmp_path / "other" / "-fp8", seed=1)
    write_text(tmp_path / "text.txt")
    steps = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))["runs"]["steps"]
    evaluate, check = (step["run"] for step in steps if step["name"] in ("Evaluate", "Check"))
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "quantkit").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m quantkit "$@"\n')
    (programs / "quantkit").chmod(0o755)

    def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
        given = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "OUTPUT": "gate", **environment}
        command = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", script]
        return subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True, check=False)

    options = "--context=32\n--max-windows-per-file=8\n--device=cpu\n--text=text.txt\n"
    done = run(evaluate, REFERENCE="original", CANDIDATES="-fp8\n", OPTIONS=options)
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "gate" / "evaluation.json").read_text(encoding="utf-8"))
    assert [candidate["model"]["name"] for candidate in made["candidates"]] == ["-fp8"]
    assert run(check, BASELINE="-b.json", OPTIONS="--update-baseline\n").returncode == 0
    passed = run(check, BASELINE="-b.json", OPTIONS="")
    assert passed.returncode == 0, passed.stderr
    run(evaluate, REFERENCE="original", CANDIDATES="other/-fp8", OPTIONS=options)
    failed = run(check, BASELINE="-b.json", OPTIONS="--sigmas=5")
    assert (failed.returncode, "error: -fp8: mean KLD got worse" in failed.stderr) == (1, True), failed.stderr
    assert (tmp_path / "gate" / "summary.md").exists()
    assert (tmp_path / "gate" / "junit.xml").exists()
