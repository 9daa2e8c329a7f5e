"""GGUF on the command line: plans, a conversion, its report, and what `inspect` prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_cli import ROOT, V3, quantkit
from tests.convert.jobs import write_model
from tests.convert.recipes import INT4, KEEP_REST
from tests.inspect.gguf_files import tiny_file, write_file
from tests.tiny_models import tiny_config

GGUF = "{name: q4, format: gguf, preset: Q4_K_M}"
PACKED = f"{{name: w4, format: compressed-tensors, rules: [{{match: 'role:expert', {INT4}}}, {KEEP_REST}]}}"
CALIBRATION = "calibration: {data: [builtin:mixed], tokens: 8192, sequence_length: 512}\n"


def recipe(folder: Path, *outputs: str, calibrated: bool = False) -> Path:
    path = folder / "recipe.yaml"
    listed = "".join(f"  - {output}\n" for output in outputs)
    path.write_text(f"version: 1\n{CALIBRATION if calibrated else ''}outputs:\n{listed}")
    return path


def test_plan_of_v3(tmp_path: Path) -> None:
    """The bytes of llama-quantize's file, and how it lies on five A100."""
    text = quantkit("plan", V3, "-r", recipe(tmp_path, GGUF), "--gpus", "5xA100-80GB")
    assert text.exit_code == 0
    assert "404,488,847,360" in text.stdout
    assert "attention      Q5_0 rtn" in text.stdout
    assert "layers 14/12/12/12/11: weights 72.8/76.0/76.0/76.0/75.2 GiB a GPU" in text.stdout
    assert "llama-server -m OUT/deepseek-v3-671b-q4.gguf -ngl 99 -c 32768 -ts 14,12,12,12,12" in text.stdout
    assert "vllm" not in text.stdout


def test_both_formats_in_one_pass(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(tiny_config(num_nextn_predict_layers=0)))
    split = GGUF.replace("}", ", split_max_size: 1MiB}")
    chosen = recipe(tmp_path, PACKED, split, calibrated=True)
    words = ("plan", tmp_path / "source", "-r", chosen, "--gpus", "2xT4-16GB", "--context", 128)
    text = quantkit(*words)
    assert text.exit_code == 0, text.stderr
    assert "output  w4: compressed-tensors" in text.stdout
    assert "output  q4: gguf" in text.stdout
    assert "vllm serve OUT/w4 --" in text.stdout
    assert "llama-server -m OUT/q4/source-q4-00001-of-00002.gguf -ngl 99 -c 128 -ts" in text.stdout
    document = json.loads(quantkit(*words, "--json").stdout)
    assert [(fit["runtime"], fit["fits"]) for fit in document["fit"]] == [("vllm", True), ("llama.cpp", True)]
    llama, output = document["fit"][1], document["outputs"][1]
    assert sum(llama["weights_bytes"]) + llama["host_bytes"] == output["nbytes"]
    small = quantkit(*words[:-3], "1xP4-1GB", *words[-2:])
    assert small.stdout.count("does not fit: ") == 2
    assert "serve" not in small.stdout.replace("output", "")
    dry = quantkit("convert", *words[1:4], "-o", tmp_path / "out", "--dry-run", "--json")
    assert {**json.loads(dry.stdout), "fit": document["fit"]} == document


def test_convert_and_inspect(tmp_path: Path) -> None:
    write_model(tmp_path / "source")
    chosen, out = (
        recipe(tmp_path, "{name: q8, format: gguf, preset: Q8_0, pre: gpt-2, split_max_size: 1GB}"),
        tmp_path / "the out",
    )
    done = quantkit("convert", tmp_path / "source", "-r", chosen, "-o", out)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[-1].split("  #") == [
        f"  llama-server -m '{out}'/source-q8.gguf", " on a machine with llama.cpp"
    ]  # fmt: skip
    found = quantkit("inspect", out)
    assert found.exit_code == 0, found.stderr
    assert f'{out}/source-q8.gguf: deepseek2, Q8_0, "source"' in found.stdout
    assert "layers 2 (1 dense), experts 4 (2 used, 1 shared)" in found.stdout
    assert "nothing unusual" in found.stdout
    document = json.loads(quantkit("inspect", out / "source-q8.gguf", "--json").stdout)
    assert (document["format"], document["file_type"], document["unusual"]) == ("gguf", "Q8_0", [])
    assert sum(holding["nbytes"] for holding in document["holdings"]) == document["nbytes"]
    planned = json.loads(quantkit("plan", tmp_path / "source", "-r", chosen, "--json").stdout)["outputs"][0]
    assert (planned["nbytes"], planned["parameters"]) == (document["nbytes"], document["parameters"])


def test_inspect_what_is_unusual(tmp_path: Path) -> None:
    keys, shapes = tiny_file()
    keys["general.name"] = "a\x1b[31mb"
    del keys["deepseek2.expert_gating_func"]
    path = write_file(tmp_path / "odd.gguf", keys, shapes)
    found = quantkit("inspect", path)
    assert found.exit_code == 0
    assert "unusual: deepseek2.expert_gating_func is missing" in found.stdout
    assert "\x1b" not in found.stdout
    path.write_bytes(path.read_bytes()[:5000])
    broken = quantkit("inspect", path)
    assert (broken.exit_code, broken.stdout) == (1, "")
    assert broken.stderr.startswith(f"error: {path}: truncated")


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("{name: a, format: gguf, preset: q4km}", "(did you mean Q4_K_M?)"),
        ("{name: a, format: gguf, preset: Q9_K}", "outputs[0].preset: found 'Q9_K', needed one of F32, F16, Q4_0"),
        ("{name: a, format: gguf}", "found neither preset, rules nor target"),
        ("{name: a, format: ggfu, preset: Q8_0}", "outputs[0]: found 'ggfu', needed"),
        ("{name: a, format: gguf, rules: [{match: '*', scheme: q4_k}]}", "(did you mean Q4_K?)"),
        ("{name: a, format: gguf, preset: Q8_0, split_max_size: 5}", "split_max_size"),
    ],
)
def test_bad_recipes(tmp_path: Path, output: str, said: str) -> None:
    result = quantkit("plan", ROOT / "examples" / "nano-deepseek-v3", "-r", recipe(tmp_path, output))
    assert result.exit_code == 1
    assert said in result.stderr
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["error", "hint"]


def test_a_plan_says_where_llama_quantize_would_ask_for_an_imatrix(tmp_path: Path) -> None:
    nano = ROOT / "examples" / "nano-deepseek-v3"
    lines = quantkit("plan", nano, "-r", recipe(tmp_path, "{name: a, format: gguf, preset: IQ2_M}")).stdout.splitlines()
    assert [line for line in lines if "imatrix" in line] == [
        "note: output a: IQ2_S without calibration or imatrix: llama-quantize refuses. All inputs count alike."
    ]
