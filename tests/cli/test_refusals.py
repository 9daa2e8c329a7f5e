"""Mistakes in a command are refused before torch, numba or a plotting library is loaded: at once, not after seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "examples" / "nano-deepseek-v3"
HEAVY = ("torch", "numba", "transformers", "plotly", "jinja2", "pandas", "pyarrow", "gguf", "triton", "rich")
PROBE = """
import atexit, json, sys
atexit.register(lambda: print(json.dumps([name for name in {heavy!r} if name in sys.modules]), file=sys.stderr))
from quantkit.cli.app import main
sys.argv[0] = "quantkit"
main()
"""
RECIPE: dict[str, Any] = {
    "version": 1,
    "calibration": {"data": ["words.txt"], "tokens": 512, "sequence_length": 64},
    "outputs": [
        {
            "name": "w4a16",
            "format": "compressed-tensors",
            "rules": [
                {"match": "role:expert", "scheme": {"kind": "int", "bits": 4, "group_size": 64}},
                {"match": "*", "keep": "source"},
            ],
        }
    ],
}
BROKEN_RULE = {"match": "role:expert", "scheme": {"kind": "int", "bits": 4, "group_size": 100}}
BROKEN_OUTPUT = {**RECIPE["outputs"][0], "rules": [BROKEN_RULE, {"match": "*", "keep": "source"}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipes with and without a fault, a text, a folder that is in the way."""
    made = tmp_path_factory.mktemp("refusals")
    recipes: dict[str, Any] = {
        "good": RECIPE,
        "unknown-key": {**RECIPE, "calibraton": None},
        "bad-plan": {**RECIPE, "outputs": [BROKEN_OUTPUT]},
        "no-calibration-text": {**RECIPE, "calibration": {**RECIPE["calibration"], "data": ["absent.txt"]}},
        "no-validation-text": {**RECIPE, "validation": {"text": ["absent.txt"], "context": 64}},
        "too-little-text": {**RECIPE, "calibration": {**RECIPE["calibration"], "tokens": 10**6}},
        "no-imatrix": {**RECIPE, "calibration": None, "imatrix": "absent.gguf"},
    }
    for name, recipe in recipes.items():
        (made / f"{name}.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    (made / "words.txt").write_text("One word after another, and no two alike. " * 200, encoding="utf-8")
    (made / "empty.txt").touch()
    (made / "above" / "model").mkdir(parents=True)
    (made / "above" / "model" / "config.json").write_text("{}", encoding="utf-8")
    (made / "mistral").mkdir()
    (made / "mistral" / "params.json").write_text("{}", encoding="utf-8")
    (made / "taken").mkdir()
    (made / "taken" / "mine.txt").write_text("mine", encoding="utf-8")
    return made


def refused(folder: Path, words: str) -> tuple[int, str]:
    """Exit code and stderr of a command that loaded nothing heavy. N: the small model."""
    listed = [str(NANO) if word == "N" else word for word in words.split()]
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(heavy=HEAVY), *listed],
        cwd=folder,
        text=True,
        capture_output=True,
        check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    *said, loaded = done.stderr.splitlines()
    assert json.loads(loaded) == []
    assert done.stdout == ""
    return done.returncode, "\n".join(said)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("convert absent -r good.yaml -o out", 1, "error: absent: no such folder."),
        ("convert taken -r good.yaml -o out", 1, "error: taken/config.json: no such file."),
        ("convert N -r nano-dmeo -o out", 1, "error: recipe 'nano-dmeo': found neither a file"),
        ("convert N -r unknown-key.yaml -o out", 1, "calibraton: found an unknown key"),
        ("convert N -r bad-plan.yaml -o out", 1, "is not a multiple of group_size 100"),
        ("convert N -r no-calibration-text.yaml -o out", 1, "error: absent.txt: no such file."),
        ("convert N -r no-validation-text.yaml -o out", 1, "error: absent.txt: no such file."),
        ("convert N -r too-little-text.yaml -o out", 1, "error: calibration: 1,000,000 tokens were asked for"),
        ("convert N -r no-imatrix.yaml -o out", 1, "absent.gguf: no such imatrix file."),
        ("convert N -r good.yaml -o taken", 1, "error: taken: exists already, and is no folder that quantkit made"),
        ("convert N -r good.yaml -o taken --restart", 1, "error: taken: is no folder that quantkit made"),
        ("convert N -r good.yaml -o .", 1, "error: .: is or holds"),
        ("convert N -r good.yaml -o N", 1, "which would be replaced."),
        ("convert N -r good.yaml -o out --device tpu", 2, "'tpu' is not one of"),
        ("convert N -r good.yaml -o out --memory-budget 20bananas", 2, "needed a number with B, KB, MB"),
        ("convert N -r good.yaml -o out --jobs 0", 2, "Invalid value for '--jobs'"),
        ("convert N -r good.yaml", 2, "Missing option"),
        ("convert deepseek-ai/DeepSeek-V3 --scheme w4a16 -o out", 1, "give hf://deepseek-ai/DeepSeek-V3"),
        ("convert N -r good.yaml -o s3://bucket/out", 1, "error: s3:/bucket/out: results go to a folder"),
        ("convert N -r good.yaml -o out --cache 5bananas", 2, "needed a number with B, KB, MB"),
        ("plan ftp://host/model -r good.yaml", 1, "error: ftp://: is not read."),
        ("plan above --scheme w4a16", 1, "hint: Is it a folder inside it? There is above/model."),
        ("plan mistral --scheme w4a16", 1, "hint: There is params.json: a checkpoint in Mistral's own form"),
        ("plan absent --scheme w4a16", 1, "error: absent: no such folder."),
        ("plan absent -r good.yaml", 1, "error: absent: no such folder."),
        ("plan N -r bad-plan.yaml", 1, "is not a multiple of group_size 100"),
        ("evaluate absent N", 1, "error: absent: is not a folder, nor a file that --save-reference wrote."),
        ("evaluate N absent", 1, "error: absent: does not exist."),
        ("evaluate N taken", 1, "error: taken: holds neither safetensors nor GGUF."),
        ("evaluate N N --text absent.txt", 1, "error: absent.txt: no such file."),
        ("evaluate N N --text empty.txt", 1, "hint: Fill it, or leave it out."),
        ("evaluate N N --text ../no*.txt", 1, "hint: Looked from the folder /"),
        ("evaluate N N --context 16 --protocol exact", 2, "Invalid value for '--protocol'"),
        ("evaluate N N -o taken", 1, "error: taken: is no place for a file."),
        ("evaluate N --save-reference taken", 1, "error: taken: is no place for a file."),
        ("evaluate N", 2, "give a candidate, or --save-reference"),
        ("check absent.json -b absent.json", 1, "error: absent.json: no such file"),
        ("report absent", 1, "error: absent: not found."),
        ("inspect absent", 1, "error: absent: no such file or folder."),
    ],
)
def test_mistakes_are_refused_without_torch(folder: Path, words: str, code: int, said: str) -> None:
    before = sorted(folder.rglob("*"))
    found = refused(folder, words)
    assert found[0] == code, found[1]
    assert said in found[1]
    assert sorted(folder.rglob("*")) == before, "a refused command leaves nothing behind"


def test_an_unknown_device_is_refused_without_torch(folder: Path) -> None:
    code = (
        "import sys, quantkit\n"
        "for call in (lambda: quantkit.convert('absent', 'nano-demo', 'out', device='tpu'),\n"
        "             lambda: quantkit.evaluate('absent', 'absent', device='tpu')):\n"
        "    try: call()\n"
        "    except quantkit.QuantkitError as error: print(error.message)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    assert done.stdout.splitlines() == ["device 'tpu': auto, cpu or cuda was needed."] * 2 + ["False"]
