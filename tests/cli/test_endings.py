"""However a command ends, it says so in a line, without a traceback: wrong usage, Ctrl-C, a full or closed stdout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_refusals import NANO, ROOT

PLAN = ("plan", str(NANO), "--scheme", "w4a16", "--method", "rtn")
FULL = Path("/dev/full")
WAITING = """
import os, signal, sys
class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupted())
from quantkit.__main__ import main
sys.argv = ["quantkit", *sys.argv[1:]]
main()
"""
"""Ctrl-C comes when ``module`` is about to be imported."""


def run(*words: str, stdout: int | None = None, script: str | None = None) -> tuple[int, str]:
    """Exit code and stderr. ``script``: in place of ``python -m quantkit``."""
    start = ("-m", "quantkit") if script is None else ("-c", script)
    done = subprocess.run(
        [sys.executable, *start, *words],
        cwd=ROOT,
        stdout=subprocess.DEVNULL if stdout is None else stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("convert x -o y --scheme w4a16 --device gpu", "Invalid value for '--device': 'gpu' is not one of 'auto'"),
        ("convert x -o y --scheme w4a16 --jobs 0", "Invalid value for '--jobs': "),
        ("convert", "Missing argument 'SOURCE'."),
        ("plan x", "Missing option '--scheme', '--preset', '--recipe' / '-r', '--fit' or '--target-bpw'."),
        ("plan x --schme w4a16", "No such option: --schme"),
        ("frobnicate", "No such command 'frobnicate'."),
        ("recipes frobnicate", "No such command 'frobnicate'."),
    ],
)
def test_wrong_usage_is_two_lines(words: str, said: str) -> None:
    code, stderr = run(*words.split())
    assert code == 2
    error, hint = stderr.splitlines()
    assert error.startswith(f"error: {said}")
    assert hint == "hint: See --help."


@pytest.mark.parametrize("words", ["", "calibration"])
def test_no_words_are_answered_by_the_help(words: str) -> None:
    code, stderr = run(*words.split())
    assert code == 2
    assert stderr.startswith("Usage: ")
    assert "error:" not in stderr


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("words", [PLAN, (*PLAN, "--json"), ("--version",), ("plan", "--help"), ("recipes", "list")])
def test_a_full_stdout_is_a_line(words: tuple[str, ...]) -> None:
    with FULL.open("w") as full:
        code, stderr = run(*words, stdout=full.fileno())
    assert (code, stderr) == (1, "error: stdout: cannot be written (No space left on device).\n")


@pytest.mark.parametrize("words", [PLAN, (*PLAN, "--json"), ("--version",), ("--help",)])
def test_a_reader_that_leaves_is_no_error_to_speak_of(words: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        code, stderr = run(*words, stdout=writer)
    finally:
        os.close(writer)
    assert (code, stderr) == (1, "")


def test_without_stdout_nothing_is_printed() -> None:
    command = [sys.executable, "-m", "quantkit", *PLAN, "--json"]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command], cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("module", ["quantkit.cli.app", "typer.core", "quantkit.cli.report", "quantkit.plan.forecast"])
def test_ctrl_c_is_a_line_from_the_first_import_on(module: str) -> None:
    code, stderr = run(*PLAN, script=WAITING.format(module=module))
    assert (code, stderr) == (130, "interrupted.\n")


def test_ctrl_c_before_a_conversion_began_says_that_nothing_is_left(tmp_path: Path) -> None:
    """While torch is loaded, which takes the longest."""
    script = WAITING.format(module="torch.autograd")
    words = ("convert", str(NANO), "--scheme", "w4a16", "--method", "rtn", "-o", str(tmp_path / "out"))
    code, stderr = run(*words, script=script)
    assert code == 130
    assert stderr.splitlines()[-1] == "interrupted. Nothing was begun: nothing is to be resumed or removed."
    assert "Traceback" not in stderr
