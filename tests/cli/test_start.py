"""Ctrl-C while the package itself is loaded, before `main`: the program ends without a word, others get Python's
exception."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WAITING = """
import os, signal, sys
class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == "quantkit.api":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupted())
sys.argv = {argv}
{before}
import quantkit
"""
"""Ctrl-C comes while ``quantkit/__init__.py`` imports the first module that costs time."""


def ended(argv: list[str], before: str = "") -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", WAITING.format(argv=argv, before=before)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", ["quantkit", "/usr/bin/quantkit", "quantkit.exe"])
def test_the_program_dies_by_the_signal_and_says_nothing(name: str) -> None:
    assert ended([name]) == (-signal.SIGINT, "")


def test_so_does_the_module() -> None:
    assert ended(["-m"], 'sys.orig_argv = ["python", "-m", "quantkit", "plan"]') == (-signal.SIGINT, "")


@pytest.mark.parametrize("argv", [["train.py"], ["-m"], [""], []])
def test_a_program_of_others_gets_its_exception(argv: list[str]) -> None:
    code, said = ended(argv)
    assert code == -signal.SIGINT  # Python's own end after an exception that nobody caught
    assert said.endswith("KeyboardInterrupt\n")


def test_who_ignores_ctrl_c_goes_on_ignoring_it() -> None:
    assert ended(["quantkit"], "signal.signal(signal.SIGINT, signal.SIG_IGN)") == (0, "")
