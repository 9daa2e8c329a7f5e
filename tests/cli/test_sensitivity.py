"""`quantkit sensitivity` on the command line: table, document, needs first, refusals, Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit import sensitivity
from quantkit.documents.sensitivity import PROGRESS, SENSITIVITY, FisherProgress, read_sensitivity
from quantkit.sensitivity.folder import add_losses
from tests.cli.test_cli import quantkit
from tests.cli.test_refusals import ROOT
from tests.convert.jobs import write_model, write_text

OPTIONS = ("--tokens", 96, "--sequence-length", 32, "--device", "cpu", "--memory-budget", "1GiB")
STOPPED = """
import os, signal, sys
from quantkit.sensitivity import folder
save = folder.PassFolder.save
def stopping(self, progress):
    save(self, progress)
    if progress.backward:
        os.kill(os.getpid(), signal.SIGINT)
folder.PassFolder.save = stopping
from quantkit.__main__ import main
sys.argv = ["quantkit", *sys.argv[1:]]
main()
"""
"""Ctrl-C comes when the gradient has passed a layer."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_model(root / "model")
    write_text(root / "text.txt")
    return root


def words(source: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("sensitivity", source / "model", "-o", out, "--data", source / "text.txt", *OPTIONS, *more)


def test_table_and_folder(source: Path, tmp_path: Path) -> None:
    done = quantkit(*words(source, tmp_path / "pass"))
    assert done.exit_code == 0, done.stderr
    table, footer = done.stdout.strip().split("\n\n")
    assert table.startswith("most sensitive for each token")
    assert len(table.splitlines()) == 12
    assert footer.startswith("28 linears")
    assert "; 96 tokens, one sampled label each, seed 0." in footer
    needs, *layers = done.stderr.splitlines()
    assert needs.startswith("2 layers, 96 tokens in 3 rows: 314.6 kB of disk, ")
    assert " of memory, about " in needs
    assert [line.split("  ")[:2] for line in layers] == [
        ["layer 1/2", "forward"],
        ["layer 2/2", "forward"],
        ["layer 1/2", "backward"],
        ["layer 2/2", "backward"],
    ]
    found = sorted(path.name for path in (tmp_path / "pass").iterdir())
    assert found == ["layer-00000.safetensors", "layer-00001.safetensors", SENSITIVITY]


def test_json_is_the_document(source: Path, tmp_path: Path) -> None:
    done = quantkit(*words(source, tmp_path / "pass", "--json"))
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "pass" / SENSITIVITY).read_text())


def test_the_function_does_the_same(source: Path, tmp_path: Path) -> None:
    quantkit(*words(source, tmp_path / "pass"))
    found = sensitivity(
        source / "model",
        tmp_path / "other",
        data=str(source / "text.txt"),
        tokens=96,
        sequence_length=32,
        device="cpu",
        memory_budget="1GiB",
    )
    assert (tmp_path / "pass" / SENSITIVITY).read_text() == found.to_json()


def test_a_finished_pass_stays(source: Path, tmp_path: Path) -> None:
    assert quantkit(*words(source, tmp_path / "pass")).exit_code == 0
    done = quantkit(*words(source, tmp_path / "pass"))
    assert done.exit_code == 1
    assert done.stderr.splitlines() == [
        f"error: {tmp_path / 'pass'}: holds a finished pass of model: 2 layers of width 128, 96 tokens in rows of 32, "
        "seed 0.",
        "hint: Choose another -o, or replace it with --restart.",
    ]
    assert quantkit(*words(source, tmp_path / "pass", "--restart")).exit_code == 0


def test_a_pass_of_another_model_is_replaced_only_if_that_is_meant(source: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "other", seed=9)
    theirs = ("sensitivity", tmp_path / "other", "-o", tmp_path / "pass", "--data", source / "text.txt", *OPTIONS)
    assert quantkit(*theirs).exit_code == 0
    before = (tmp_path / "pass" / SENSITIVITY).read_bytes()
    done = quantkit(*words(source, tmp_path / "pass", "--restart"))
    assert done.exit_code == 1
    assert done.stderr.splitlines() == [
        f"error: {tmp_path / 'pass'}: holds a finished pass of another checkpoint, of other: 2 layers of width 128, "
        "96 tokens in rows of 32, seed 0.",
        "hint: Choose another -o, or replace it with --restart --force.",
    ]
    assert (tmp_path / "pass" / SENSITIVITY).read_bytes() == before
    assert quantkit(*words(source, tmp_path / "pass", "--restart", "--force")).exit_code == 0


def test_inspect_says_what_a_pass_is(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pass"
    assert quantkit(*words(source, folder)).exit_code == 0
    done = quantkit("inspect", folder)
    assert done.stdout.splitlines()[:2] == [
        f"{folder}: a Fisher pass of model: 2 layers of width 128, 96 tokens in rows of 32, seed 0",
        "losses of types: none yet; a plan with a target measures those that it needs",
    ]
    document = read_sensitivity(folder)
    add_losses(folder, document.model_copy(update={"losses": {"a": {"Q4_K": 0.1, "Q2_K": 0.2}}}))
    found = json.loads(quantkit("inspect", folder, "--json").stdout)
    assert (found["model"], found["linears"], found["types"]) == ("model", 28, ["Q2_K", "Q4_K"])
    (folder / SENSITIVITY).unlink()
    job = FisherProgress(job=document.job, forward=2, backward=1)
    (folder / PROGRESS).write_text(job.model_dump_json())
    refused = quantkit("inspect", folder)
    assert refused.exit_code == 1
    assert "holds an unfinished Fisher pass: 2 of 2 layers forward, 1 backward." in refused.stderr


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--tokens", 10**7), "10,000,000 tokens were asked for"),
        (("--sequence-length", 4096), "--sequence-length 4,096: "),
        (("--data", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_refusals(more: tuple[object, ...], said: str, source: Path, tmp_path: Path) -> None:
    done = quantkit(*words(source, tmp_path / "pass", *more))
    assert done.exit_code == 1
    assert said in done.stderr
    assert done.stderr.count("error:") == 1
    assert not (tmp_path / "pass").exists()


def test_ctrl_c_says_how_to_go_on(source: Path, tmp_path: Path) -> None:
    given = [str(word) for word in words(source, tmp_path / "pass")]
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, *given],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr.splitlines()[-1].startswith("interrupted. Resume with: ")
    assert " sensitivity " in done.stderr.splitlines()[-1]
    assert (tmp_path / "pass" / PROGRESS).exists()


def test_tokens_may_be_left_out(source: Path, tmp_path: Path) -> None:
    """The default is asked for: this text is too short for it."""
    words = ("sensitivity", source / "model", "-o", tmp_path / "pass", "--data", source / "text.txt")
    done = quantkit(*words, "--sequence-length", 32)
    assert done.exit_code == 1
    assert "32,768 tokens were asked for" in done.stderr


def test_a_config_of_more_layers_is_refused(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source / "model", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps({**told, "num_hidden_layers": told["num_hidden_layers"] + 1}))
    done = quantkit("sensitivity", tmp_path / "model", "-o", tmp_path / "pass", "--data", source / "text.txt", *OPTIONS)
    assert done.exit_code == 1
    assert "missing" in done.stderr or "no such tensor" in done.stderr
    assert not (tmp_path / "pass").exists()
