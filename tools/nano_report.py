"""Measure a small DeepSeek-V3 checkpoint on `calibration_data/eval`: perplexity by domain, use of the experts.

    python tools/nano_report.py FOLDER... [--windows 8] [--round-bits B --group G] [--routing]

transformers, float32, CPU. A window is BOS + 511 tokens of one file (chat: the rendered conversations); of the n
whole windows of a file the windows `unique(int(linspace(0, n - 1, W)))` are scored, one forward pass each. FP8
folders go through tools/fp8_cast.py to-bf16 first.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, DeepseekV3ForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

EVAL_FOLDER = Path(__file__).resolve().parent.parent / "calibration_data" / "eval"
CONTEXT = 512


def eval_ids(tokenizer: PreTrainedTokenizerBase, path: Path) -> list[int]:
    """Token ids of one file of the evaluation split, without a leading BOS."""
    if path.suffix == ".txt":
        return tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    text = "".join(tokenizer.apply_chat_template(messages, tokenize=False) for messages in rows)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def eval_windows(tokenizer: PreTrainedTokenizerBase, path: Path, count: int) -> Tensor:
    """(windows, 512) int64."""
    ids = torch.tensor(eval_ids(tokenizer, path))
    whole = ids[: len(ids) // (CONTEXT - 1) * (CONTEXT - 1)].view(-1, CONTEXT - 1)
    chosen = torch.linspace(0, len(whole) - 1, count, dtype=torch.float64).long().unique()
    return F.pad(whole[chosen], (1, 0), value=tokenizer.bos_token_id)


@torch.no_grad()
def mean_loss(model: PreTrainedModel, windows: Tensor) -> float:
    """Mean next-token loss in nats."""
    losses = [F.cross_entropy(model(window[None]).logits[0, :-1].float(), window[1:]).item() for window in windows]
    return sum(losses) / len(losses)


def losses_by_domain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int) -> dict[str, float]:
    files = sorted(EVAL_FOLDER.iterdir())
    return {path.stem: mean_loss(model, eval_windows(tokenizer, path, count)) for path in files}


@torch.no_grad()
def round_projections(model: PreTrainedModel, bits: int, group: int) -> None:
    """Round every projection to nearest, symmetric, in place (not router, head, embedding): only for orientation."""
    top = 2 ** (bits - 1) - 1
    for name, value in model.named_parameters():
        if "proj" in name and value.ndim >= 2:
            rows = value.reshape(-1, group)
            scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / top
            value.copy_(((rows / scale).round().clamp(-top - 1, top) * scale).view_as(value))


@torch.no_grad()
def routing(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int) -> dict[int, dict[str, Tensor]]:
    """Layer -> domain -> share of the choices that each expert got."""
    config = model.config
    chosen: dict[int, list[Tensor]] = {}
    handles = []
    for index, layer in enumerate(model.model.layers[config.first_k_dense_replace :], config.first_k_dense_replace):
        chosen[index] = []

        def keep(_module: object, _inputs: object, output: tuple[Tensor, Tensor, Tensor], index: int = index) -> None:
            chosen[index].append(output[2])  # (logits, weights, chosen experts)

        handles.append(layer.mlp.gate.register_forward_hook(keep))
    result: dict[int, dict[str, Tensor]] = {index: {} for index in chosen}
    for path in sorted(EVAL_FOLDER.iterdir()):
        mean_loss(model, eval_windows(tokenizer, path, count))
        for index, rows in chosen.items():
            counts = torch.bincount(torch.cat(rows).flatten(), minlength=config.n_routed_experts).double()
            result[index][path.stem] = counts / counts.sum()
            rows.clear()
    for handle in handles:
        handle.remove()
    return result


def print_routing(shares: dict[int, dict[str, Tensor]]) -> None:
    for layer, by_domain in shares.items():
        table = torch.stack(list(by_domain.values()))
        load = table.mean(0) * table.shape[1]
        pairs = [(a - b).abs().sum() / 2 for i, a in enumerate(table) for b in table[:i]]
        print(f"layer {layer}: load {load.min():.2f}..{load.max():.2f}, mean distance {sum(pairs) / len(pairs):.3f}")
        for name, share in by_domain.items():
            thin = (share < 0.005).sum().item()
            print(f"  {name:12} top 3 experts take {share.topk(3).values.sum():.2f}; {thin} experts under 0.5 %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--round-bits", type=int, default=None)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--routing", action="store_true")
    arguments = parser.parse_args()
    for folder in arguments.folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if arguments.round_bits:
            round_projections(model, arguments.round_bits, arguments.group)
        losses = losses_by_domain(model, tokenizer, arguments.windows)
        losses["mean"] = sum(losses.values()) / len(losses)
        print(folder, f"int{arguments.round_bits} g{arguments.group}" if arguments.round_bits else "as stored")
        print("  " + ", ".join(f"{name} {math.exp(value):.4f}" for name, value in losses.items()))
        if arguments.routing:
            print_routing(routing(model, tokenizer, arguments.windows))


if __name__ == "__main__":
    main()
