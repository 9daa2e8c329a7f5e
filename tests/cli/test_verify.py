"""`quantkit verify`: text, JSON, exit codes; and what a conversion says of its own result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantkit.cli.app import app
from tests.convert.jobs import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "model"
    write_model(folder)
    return folder


def test_a_sound_folder(model: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(model), "--sample", "4", "--source", str(model)])
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert lines[0].startswith(f"{model}: unquantised, ")
    assert "note: no quantkit.json with checksums: the bytes were not compared." in lines
    assert lines[-2:] == ["decoded: 4 linears, and compared with the original", "sound: no faults"]


def test_a_fault_ends_with_1(model: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(model), "--quick", "--tp", "3"])
    assert result.exit_code == 1
    *_, fault, verdict = [line for line in result.stdout.splitlines() if not line.startswith("note: ")]
    assert fault.startswith("fault: vllm: tensor parallelism over 3 GPUs: ")
    assert verdict == "NOT SOUND: 1 fault"


def test_json(model: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(model), "--quick", "--runtime", "transformers", "--json"])
    found = json.loads(result.stdout)
    assert found["passed"] is True
    assert found["runtimes"] == ["transformers"]
    assert found["decoded_linears"] == 0
    assert {finding["fault"] for finding in found["findings"]} == {False}


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert result.stderr.splitlines()[0].startswith("error: ")
