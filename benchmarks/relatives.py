"""Quality of each treatment on small trained models of other families (tools/train_relatives.py).

    PYTHONPATH=. python benchmarks/relatives.py MODEL [--device cuda] [--save FILE]

Each case is a conversion of its own, calibrated with builtin:mixed and judged by its own validation: KL divergence from
the original model in nats per token on builtin:eval, windows of 512 tokens, eight of each file, with the standard error
over windows. Linears whose inputs are no multiple of 128 have groups of 64.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from synthetic import machine

from quantkit import convert
from quantkit.arch import arch_of
from quantkit.arch.base import ModelArch
from quantkit.formats.source import read_config
from quantkit.plan.recipe import Recipe

LINEARS = "role:attention|mlp|shared_expert|expert"
GROUP = 128
INT4 = {"kind": "int", "bits": 4, "group_size": GROUP}
AWQ = {"kind": "awq", "then": "gptq"}


def rules(arch: ModelArch, method: dict[str, Any], bits: tuple[int, int] = (4, 4)) -> list[dict[str, Any]]:
    """``bits``: of the routed experts, and of the other linears."""
    odd = [spec for spec in arch.tensors() if spec.linear and spec.shape[-1] % GROUP]
    narrow = dict.fromkeys("*." + ".".join(spec.name.split(".")[-3:]) for spec in odd)
    found = [
        {"match": name, "scheme": {**INT4, "bits": bits[1], "group_size": 64}, "method": method} for name in narrow
    ]
    found.append({"match": "role:expert", "scheme": {**INT4, "bits": bits[0]}, "method": method})
    found.append({"match": LINEARS, "scheme": {**INT4, "bits": bits[1]}, "method": method})
    return [*found, {"match": "*", "keep": "source"}]


def outputs(arch: ModelArch) -> dict[str, dict[str, Any]]:
    """Case -> output of its recipe."""
    folder, gptq = {"format": "compressed-tensors"}, {"kind": "gptq"}
    return {
        "int4 rtn": {**folder, "rules": rules(arch, {"kind": "rtn"})},
        "int4 gptq": {**folder, "rules": rules(arch, gptq)},
        "int4 awq+gptq": {**folder, "rules": rules(arch, AWQ)},
        "experts int4, rest int8, gptq": {**folder, "rules": rules(arch, gptq, (4, 8))},
        "int3 gptq": {**folder, "rules": rules(arch, gptq, (3, 3))},
        "Q4_K_M rtn": {"format": "gguf", "preset": "Q4_K_M", "method": {"kind": "rtn"}},
        "Q4_K_M gptq": {"format": "gguf", "preset": "Q4_K_M", "method": gptq},
    }


def measured(model: Path, output: dict[str, Any], tokens: int, device: str) -> dict[str, Any]:
    """One conversion -> bits per weight, and what its validation found."""
    document = {
        "version": 1,
        "calibration": {"data": ["builtin:mixed"], "tokens": tokens, "sequence_length": 512, "seed": 0},
        "validation": {"text": ["builtin:eval"], "context": 512, "max_windows_per_file": 8},
        "outputs": [{"name": "main", **output}],
    }
    with tempfile.TemporaryDirectory() as folder:
        report = convert(model, Recipe.model_validate(document), Path(folder) / "out", device=device)  # pyright: ignore
    (found,) = report.outputs
    assert found.validation is not None
    scores = found.validation.scores
    return {
        "bpw": round(found.bpw, 3),
        "windows": scores.windows,
        "reference_perplexity": scores.reference_perplexity.mean,
        "perplexity_ratio": scores.perplexity_ratio.model_dump(),
        "mean_kl": scores.mean_kl.model_dump(),
        "top1": scores.top1.mean,
        "seconds": round(report.total_seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--only", nargs="+", metavar="CASE")
    parser.add_argument("--save", type=Path, metavar="FILE", help="add what was found to this JSON file")
    options = parser.parse_args()
    arch = arch_of(read_config(options.model))
    rows: dict[str, Any] = {}
    for name, output in outputs(arch).items():
        if options.only is None or name in options.only:
            rows[name] = measured(options.model, output, options.tokens, options.device)
            print(name, json.dumps(rows[name]), flush=True)
    if options.save is not None:
        before = json.loads(options.save.read_text())["rows"] if options.save.exists() else []
        others = [row for row in before if row["model"] != options.model.name]
        cuda = options.device != "cpu" and torch.cuda.is_available()
        used = torch.cuda.get_device_name() if cuda else "cpu"
        row = {"model": options.model.name, **machine(), "device_used": used, "tokens": options.tokens, "cases": rows}
        options.save.write_text(json.dumps({"rows": [*others, row]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
