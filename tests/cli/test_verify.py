"""`quantkit verify`: text, JSON, exit codes; and what a conversion says of its own result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantkit.cli.app import app
from quantkit.plan.recipe import Recipe
from tests.convert.gguf_jobs import gguf_output, gguf_recipe
from tests.convert.jobs import run, write_model


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


def test_every_shard_that_cannot_be_read_is_a_fault(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    first, second, third = sorted(broken.glob("*.safetensors"))
    first.unlink()
    third.write_bytes(third.read_bytes()[:-10])
    result = CliRunner().invoke(app, ["verify", str(broken)])
    faults = [line for line in result.stdout.splitlines() if line.startswith("fault: ")]
    assert (result.exit_code, len(faults)) == (1, 2)
    assert faults[0] == f"fault: {first}: no such file."
    assert faults[1].startswith(f"fault: {third}: ")
    assert faults[1].endswith("(truncated).")
    assert str(second) not in result.output
    assert result.stdout.splitlines()[-2:] == ["decoded: no linears, because of the faults", "NOT SOUND: 2 faults"]


def test_a_shard_alone_leads_to_its_folder(model: Path) -> None:
    shard = next(model.glob("*.safetensors"))
    result = CliRunner().invoke(app, ["verify", str(shard)])
    assert result.stderr.splitlines() == [
        f"error: {shard}: is one file of a checkpoint, its folder was needed.",
        f"hint: quantkit verify {model}",
    ]


def test_a_gguf_that_was_deleted_is_missed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_model(source)
    run(source, gguf_recipe(gguf_output(preset="Q8_0"), tokens=None), tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.gguf")
    file.unlink()
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert f"fault: {file.name}: is missing." in result.stdout.splitlines()
    result = CliRunner().invoke(app, ["verify", str(file)])
    assert result.stderr.splitlines()[0] == f"error: {file}: no such file."
    assert "config.json" not in result.stderr


def test_a_gguf_that_cannot_be_read_has_no_count(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_model(source)
    run(source, gguf_recipe(gguf_output(preset="F32", split_max_size="1MiB"), tokens=None), tmp_path / "out")
    first, second, *_ = sorted((tmp_path / "out").glob("*.gguf"))
    second.unlink()
    result = CliRunner().invoke(app, ["verify", str(first), "--quick"])
    assert (result.exit_code, result.stdout.splitlines()[0]) == (1, f"{first}: GGUF, for llama.cpp")
    first.write_bytes(first.read_bytes()[:2000])
    result = CliRunner().invoke(app, ["verify", str(first), "--quick", "--json"])
    assert (result.exit_code, json.loads(result.stdout)["tensors"]) == (1, None)


def test_bitsandbytes_is_for_transformers(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_model(source)
    rule = {"match": "role:attention|mlp|shared_expert", "scheme": {"kind": "bnb4"}, "method": {"kind": "rtn"}}
    values = {"name": "nf4", "format": "bitsandbytes", "rules": [rule, {"match": "*", "keep": "source"}]}
    run(source, Recipe.from_dict({"version": 1, "outputs": [values]}), tmp_path / "out")
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "out"), "--quick"])
    assert result.exit_code == 0, result.stdout
    assert result.stdout.splitlines()[0].endswith(" tensors, for transformers")
    assert "note: vllm: quant_method is bitsandbytes: vLLM 0.33 does not read it, transformers does." in result.stdout
