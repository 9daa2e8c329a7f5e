"""Compare what vLLM computed with quantkit's own forward pass over the same files, token by token. Needs no GPU.

    python benchmarks/vllm/compare.py DIR RESULTS.json [--out benchmarks/results/vllm_load.json]

The twin of a case is `tests.oracles.forward` in float32 over the decoded weights of the folder that vLLM loaded. vLLM
computes in BF16, so the two differ even for weights that are not quantised (case ``bf16``): that is the noise floor.
Controls show what a misread file would look like: the twin with the signs of all scales dropped, the twin whose FP8
blocks have each other's scales, and the twin of the unquantised model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from quantkit.arch import arch_of  # noqa: E402
from quantkit.formats import open_source  # noqa: E402
from quantkit.formats.folder import FolderSource  # noqa: E402
from quantkit.formats.layouts import READERS  # noqa: E402
from quantkit.formats.source import quant_method, read_config  # noqa: E402
from quantkit.schemes import Float8Scheme, IntScheme  # noqa: E402
from tests.oracles.forward import logits  # noqa: E402

UNQUANTIZED = "bf16"
FP8_MAX = 448.0
WHAT = "log-probabilities by vLLM and by quantkit's own forward of the same files"
KERNELS = ("Kernel for", "Selected", "MoE backend", "prefill backend", "attention backend", "AttentionBackend")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare vLLM's log-probabilities with quantkit's.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "vllm_load.json")
    given = parser.parse_args()
    measured = json.loads(given.results.read_text())
    rows = [compare(given.directory, run, record) for run, record in measured.pop("runs").items()]
    made = {"what": WHAT, "command": "python benchmarks/vllm/compare.py DIR RESULTS.json"}
    document = {**made, **measured, "runs": rows}
    given.out.write_text(json.dumps(document, indent=2) + "\n")
    print(table(rows))


def packed(folder: Path) -> FolderSource:
    """The folder by its own layout's reader."""
    return FolderSource(folder, READERS[str(quant_method(read_config(folder)))])


class Twin:
    """The float32 forward pass over one folder. ``changed`` may alter a decoded weight: (name, weight) -> weight."""

    def __init__(self, folder: Path, changed: Callable[[str, Tensor], Tensor] | None = None) -> None:
        config = json.loads((folder / "config.json").read_text())
        self.arch = arch_of(config)
        self.source = packed(folder) if "quantization_config" in config else open_source(folder)
        self.changed = changed
        self.weights: dict[str, Tensor] = {}
        self.float8: set[int] = set()

    def weight(self, name: str) -> Tensor:
        """Decoded, float32, kept for the next call."""
        if name not in self.weights:
            weight = self.source.read(name).float()
            self.weights[name] = weight if self.changed is None else self.changed(name, weight)
            if isinstance(self.source, FolderSource) and isinstance(self.source.scheme(name), Float8Scheme):
                self.float8.add(storage(self.weights[name]))
        return self.weights[name]

    def logprobs(self, tokens: Tensor, bfloat16: bool = False) -> Tensor:
        """tokens (rows, n) int64 -> log-probability of each token but the first, (rows, n - 1). ``bfloat16``: what goes
        into linears and comes out of them is rounded."""
        with torch.inference_mode(), RoundedLinears(self.float8, bfloat16):
            scores = logits(self.arch, self.weight, tokens)[:, :-1].log_softmax(-1)
        return scores.gather(-1, tokens[:, 1:, None]).squeeze(-1)


class RoundedLinears(TorchFunctionMode):
    """Linears with FP8 weights get their inputs in FP8 too, one scale for each token and 128 channels, as config.json
    asks of a runtime that multiplies in FP8. With ``bfloat16`` all linears read and write BF16."""

    def __init__(self, float8: set[int], bfloat16: bool) -> None:
        super().__init__()
        self.float8 = float8
        self.bfloat16 = bfloat16

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.linear:
            return func(*args, **(kwargs or {}))
        x, weight = args
        if self.bfloat16:
            x = x.bfloat16().float()
        if storage(weight) in self.float8:
            x = rounded_to_float8(x)
        y = func(x, weight)
        return y.bfloat16().float() if self.bfloat16 else y


def storage(weight: Tensor) -> int:
    """The same for a weight and its views; attention multiplies with some heads at a time."""
    return weight.untyped_storage().data_ptr()


def rounded_to_float8(x: Tensor) -> Tensor:
    """x (..., n) float32 -> the same after encoding as FP8 e4m3 with one float32 scale for 128 channels."""
    groups = x.unflatten(-1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) / FP8_MAX
    return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2)


def without_signs(folder: Path) -> Callable[[str, Tensor], Tensor]:
    """A reader that takes every scale as positive."""
    source = packed(folder)

    def changed(name: str, weight: Tensor) -> Tensor:
        scheme = source.scheme(name)
        if not isinstance(scheme, IntScheme):
            return weight
        signs = source.raw.read(f"{name}_scale").float().sign()
        return (weight.unflatten(-1, (signs.shape[1], -1)) * signs.unsqueeze(-1)).flatten(-2)

    return changed


def with_moved_scales(folder: Path) -> Callable[[str, Tensor], Tensor]:
    """A reader that gives every FP8 block the scale of the block before it."""
    source = packed(folder)

    def changed(name: str, weight: Tensor) -> Tensor:
        if not isinstance(source.scheme(name), Float8Scheme):
            return weight
        scale = source.raw.read(f"{name}_scale").float()
        factor = scale.flatten().roll(1).view_as(scale) / scale
        wide = factor.repeat_interleave(128, 0).repeat_interleave(128, 1)
        return weight * wide[: weight.shape[0], : weight.shape[1]]

    return changed


def compare(directory: Path, run: str, record: dict[str, Any]) -> dict[str, Any]:
    """One row of the result: what vLLM gave, what the twin gives, and how far apart they are."""
    if "error" in record:
        return {"run": run, "loads": False, "error": record["error"], "log": record["log"]}
    folder = directory / run.partition("@")[0]
    prompts = torch.tensor(json.loads(folder.with_name("prompts.json").read_text()))
    theirs = torch.tensor(record["prompt_logprobs"])
    twin = Twin(folder)
    new_tokens = torch.tensor(record["new_tokens"])
    ours_with_new = twin.logprobs(torch.cat((prompts, new_tokens), 1))
    ours, ours_new = ours_with_new.split([theirs.shape[1], new_tokens.shape[1]], 1)
    row: dict[str, Any] = {
        "run": run,
        "loads": True,
        "load_s": record["load_s"],
        "nll_vllm": round(-theirs.mean().item(), 5),
        "nll_twin": round(-ours.mean().item(), 5),
        "prompt": distance(theirs, ours),
        "greedy": distance(torch.tensor(record["new_logprobs"]), ours_new),
        "noise": distance(twin.logprobs(prompts, bfloat16=True), ours),
        "controls": {"unquantized": distance(theirs, Twin(folder.parent / UNQUANTIZED).logprobs(prompts))},
        "kernels": [line for line in record["log"] if any(word in line for word in KERNELS)],
    }
    if isinstance(twin.source, FolderSource):
        if any(isinstance(twin.source.scheme(name), IntScheme) for name in twin.source.infos()):
            names = [name for name in twin.source.raw.infos() if name.endswith("weight_scale")]
            scales = [twin.source.raw.read(name).float() for name in names]
            negative = sum((scale < 0).sum().item() for scale in scales)
            row["negative_scales"] = round(negative / sum(scale.numel() for scale in scales), 4)
            row["controls"]["signs_dropped"] = distance(theirs, Twin(folder, without_signs(folder)).logprobs(prompts))
        if twin.float8:
            moved = Twin(folder, with_moved_scales(folder)).logprobs(prompts)
            row["controls"]["float8_scales_moved"] = distance(theirs, moved)
    return row


def distance(theirs: Tensor, ours: Tensor) -> dict[str, float]:
    """Of the absolute differences of two sets of log-probabilities, in nats."""
    difference = (theirs - ours).abs()
    return {
        "mean": round(difference.mean().item(), 4),
        "median": round(difference.median().item(), 4),
        "max": round(difference.max().item(), 4),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = [
        "| run | loads | NLL vLLM / twin | mean, median abs dlogprob | greedy | noise | unquantised | signs dropped |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if not row["loads"]:
            lines.append(f"| {row['run']} | no: {row['error']} | | | | | | |")
            continue
        controls = row["controls"]
        found = [row["prompt"], row["greedy"], row["noise"], controls["unquantized"], controls.get("signs_dropped")]
        cells = [f"{d['mean']:.3f}, {d['median']:.3f}" if d else "" for d in found]
        lines.append(f"| {row['run']} | yes | {row['nll_vllm']:.4f} / {row['nll_twin']:.4f} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
