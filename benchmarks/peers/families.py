"""quantkit beside llm-compressor, gptqmodel and llama.cpp on trained models of other families, by the peers' protocol.

    benchmarks/peers/setup.sh llmcompressor gptqmodel
    python benchmarks/peers/families.py MODEL... [--only "quantkit int4" ...] [--work DIR]

MODEL is a folder that tools/train_relatives.py wrote; text and windows are those of tiny-deepseek-v3, tokenised by the
model's own tokenizer. Rows go to results/peers_families.json; of what does not run, the error. Half an hour a model on
two cores. What a peer left under DIR (build/families) is not made again.

transformers evaluates all of them. Kimi K2's model_type belongs to code of its own, which is that of DeepSeek V3:
peers and evaluator read it as deepseek_v3.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import yaml
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LLAMA = HERE.parent / "llama_cpp"
sys.path[:0] = [str(ROOT), str(HERE.parent), str(LLAMA)]

from decoded import Stopwatch  # noqa: E402  (its folder is no package)
from evaluate import evaluate_decoded, evaluation_record, rtn_row, show  # noqa: E402
from protocol import calibration_windows, narrow  # noqa: E402
from quality import recipe as gguf_recipe  # noqa: E402
from quality_tiny import decode  # noqa: E402
from quality_tiny import recipe as int_recipe  # noqa: E402
from rows import row_of, row_of_weights  # noqa: E402

from tests.oracles import ggml  # noqa: E402
from tests.oracles.gguf_reader import official, read_types  # noqa: E402
from tests.oracles.llama_imatrix import read_means  # noqa: E402

RESULTS = HERE.parent / "results" / "peers_families.json"
WHAT = (
    "trained models of other families, 88 held-out windows of 512 tokens, KLD in nats against the BF16 weights, float32"
)
COMMAND = "python benchmarks/peers/families.py MODEL..."
TOKENS = 131_072
READ_AS = {"kimi_k2": "deepseek_v3"}
"""model_type of config.json -> the one that transformers holds."""
MIXES = ("Q4_K_M", "IQ4_XS")
FLOATS = ("F32", "F16", "BF16")
F32 = {"format": "gguf", "rules": [{"match": "*", "keep": "f32"}]}
SAID = re.compile(r"^\w[\w.]*(?:Error|Exception)\b.*", re.MULTILINE)

Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """A model, and where what is made of it goes."""

    model: Path
    folder: Path

    def path(self, name: str) -> Path:
        return self.folder / f"{self.model.name}-{name}"


# Who can be asked


def rtn(_work: Work) -> Row:
    return rtn_row("int4")


def quantkit_int4(work: Work) -> Row:
    folder = fresh(work, "quantkit")
    report = converted(work.model, {**int_recipe("int4", TOKENS), "validation": None}, folder)
    decode(folder / "out", folder / "decoded")
    note = {"settings": f"gptq with quantkit's defaults, {TOKENS:,} tokens", "seconds": report["seconds"]["total"]}
    return evaluate_decoded(folder / "decoded", "quantkit", "int4", note)


def peer(name: str, *settings: str, work: Work) -> Row:
    """A peer's script in its own environment; what it printed stays in a log beside its weights."""
    out = work.path(name)
    if not (out / "run.json").exists():
        words = [ROOT / ".venvs" / name / "bin" / "python", HERE / f"peer_{name}.py", "--scheme", "int4", "--out", out]
        logged([*words, *settings], out.with_suffix(".log"))
    return evaluate_decoded(out, name, "int4")


def quantkit_gguf(mix: str, work: Work) -> Row:
    folder = fresh(work, f"quantkit-{mix}")
    report = converted(work.model, gguf_recipe(mix, TOKENS), folder)
    note = {"name": "quantkit", "scheme": mix, "settings": f"gptq, {TOKENS:,} tokens; wall seconds with calibration"}
    return row_of(gguf_in(folder), {**note, "seconds": round(report["seconds"]["total"], 1)}, own=False)


def llama_cpp(mix: str, work: Work) -> Row:
    """ggml_quantize_chunk, which llama-quantize calls, with the imatrix of llama.cpp. The types are those of quantkit's
    file of that mix, which presets.py holds against llama-quantize's own."""
    file = gguf_in(work.path(f"quantkit-{mix}"))
    watch = Stopwatch()
    arrays = quantized(float_gguf(work), read_types(file), importance(work))
    note = {"settings": f"ggml_quantize_chunk, llama.cpp's imatrix of {TOKENS:,} tokens; CPU seconds"}
    note = {"name": "llama.cpp", "scheme": mix, **note, "seconds": watch.read()["cpu_seconds"]}
    return row_of_weights(file, official(arrays), note)


def quantized(
    source: Path, types: Mapping[str, tuple[str, tuple[int, ...], int]], means: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Each tensor of a float file as ggml rounds it to its type: name -> decoded float32."""
    arrays = {tensor.name: np.array(tensor.data, dtype=np.float32) for tensor in gguf.GGUFReader(source).tensors}
    for name, array in arrays.items():
        kind = types[name][0]
        if kind not in FLOATS:
            arrays[name] = rounded(kind, array, means.get(name))
    return arrays


def rounded(kind: str, array: np.ndarray, mean: np.ndarray | None) -> np.ndarray:
    """Each matrix (out, in) of a tensor with its own importance, where there is one."""
    matrices = torch.from_numpy(array).reshape(-1, *array.shape[-2:])
    parts: Sequence[Tensor | None] = [None] * len(matrices)
    if mean is not None:
        parts = list(torch.from_numpy(mean).reshape(len(matrices), -1))
    blocks = [ggml.quantize(kind, matrix, part) for matrix, part in zip(matrices, parts, strict=True)]
    return torch.stack([ggml.dequantize(kind, block) for block in blocks]).reshape(array.shape).numpy()


CASES: Mapping[tuple[str, str], Callable[[Work], Row]] = {
    ("RTN", "int4"): rtn,
    ("quantkit", "int4"): quantkit_int4,
    ("llmcompressor", "int4"): lambda work: peer("llmcompressor", "--damp", "0.01", work=work),
    ("gptqmodel", "int4"): lambda work: peer("gptqmodel", "--mse", "2.4", work=work),
    **{("quantkit", mix): partial(quantkit_gguf, mix) for mix in MIXES},
    **{("llama.cpp", mix): partial(llama_cpp, mix) for mix in MIXES},
}
"""Name and scheme of a row -> how it is made. The peers' settings were the best of theirs on tiny-deepseek-v3."""


# Steps


def logged(words: list[Any], log: Path) -> str:
    """Run a command -> what it printed."""
    cwd = log.parent / "cwd"  # some peers write logs/ where they are started
    cwd.mkdir(exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            [str(word) for word in words], cwd=cwd, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    said = log.read_text(encoding="utf-8", errors="replace")
    if done.returncode:
        raise RuntimeError((SAID.findall(said) or said.strip().splitlines() or ["no word"])[-1][:400])
    return said


def fresh(work: Work, name: str) -> Path:
    """An empty folder for a conversion."""
    folder = work.path(name)
    if folder.exists():
        subprocess.run(["rm", "-r", str(folder)], check=True)
    folder.mkdir()
    return folder


def converted(model: Path, recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """``quantkit convert`` into folder/out -> its --json document."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "quantkit", "convert", str(model), "-r", str(path), "-o", str(folder / "out")]
    done = subprocess.run([*command, "--json"], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def gguf_in(folder: Path) -> Path:
    (file,) = (path for path in (folder / "out").glob("*.gguf") if path.name != "imatrix.gguf")
    return file


def float_gguf(work: Work) -> Path:
    """The model in F32, what llama.cpp's tools start from."""
    folder = work.path("f32")
    if not folder.exists():
        folder.mkdir()
        converted(work.model, {"version": 1, "outputs": [{"name": "source", **F32}]}, folder)
    return gguf_in(folder)


def importance(work: Work) -> dict[str, np.ndarray]:
    """Weight -> mean squares of its inputs over the peers' windows, by llama.cpp's own graph."""
    file = work.path("imatrix.gguf")
    if not file.exists():
        logged([sys.executable, LLAMA / "imatrix.py", float_gguf(work), file], file.with_suffix(".log"))
    return read_means(file)


def for_transformers(work: Work) -> Path:
    """A folder of links to the model whose config.json names a model_type that transformers holds."""
    folder = work.path("model")
    folder.mkdir(exist_ok=True)
    for file in (file for file in work.model.iterdir() if not (folder / file.name).exists()):
        (folder / file.name).symlink_to(file.resolve())
    config = json.loads((work.model / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").unlink()
    kind = READ_AS.get(config["model_type"], config["model_type"])
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}, indent=1), encoding="utf-8")
    return folder


def store(row: Row) -> None:
    """Put the row into the results, in place of an older one of the same model, name and scheme."""
    key = ("model", "name", "scheme")
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.exists() else []
    rows = [old for old in rows if any(old[k] != row[k] for k in key)] + [row]
    head = f'{{"what": {json.dumps(WHAT)},\n"command": {json.dumps(COMMAND)},\n"rows": [\n'
    RESULTS.write_text(head + ",\n".join(json.dumps(r) for r in rows) + "\n]}\n", encoding="utf-8")


def ask(work: Work, name: str, scheme: str) -> Row:
    """One row, or why there is none."""
    key = {"model": work.model.name, "name": name, "scheme": scheme}
    try:
        return {**key, **CASES[name, scheme](work)}
    except (RuntimeError, subprocess.CalledProcessError) as error:
        return {**key, "error": str(error), "evaluation": evaluation_record()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--only", nargs="+", metavar="CASE", choices=[" ".join(case) for case in CASES])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "families")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    for model in given.models:
        work = Work(model.resolve(), given.work.resolve())
        os.environ["PEERS_MODEL"] = str(for_transformers(work))
        print(f"{model.name}: {calibration_windows().numel():,} tokens, groups of 64: {', '.join(narrow()) or 'none'}")
        for name, scheme in (case for case in CASES if given.only is None or " ".join(case) in given.only):
            row = ask(work, name, scheme)
            store(row)
            print(row["error"]) if "error" in row else show(row)


if __name__ == "__main__":
    main()
