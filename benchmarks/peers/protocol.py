"""The fixed comparison on tiny-deepseek-v3: text in, token windows out; decoded weights in, divergence out.
PEERS_MODEL names the folder of another model; relatives.py uses that.

Evaluation: 88 windows of 512 tokens (BOS + 511), eight of each of the 11 held-out domains, evenly spread over the file.
Calibration: 256 windows of 512 tokens (131,072) of the calibration text of the same domains, 23 or 24 of each.
A candidate is a folder of safetensors with float weights under the official names; it is run by transformers in
float32 on the CPU and compared with the reference weights, so nothing here shares code with quantkit.

Imports that only the evaluation needs sit inside functions: the peers' own environments import the windows only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOW = 512
"""Tokens of a window, BOS included."""
EVAL_PER_DOMAIN = 8
CALIBRATION_WINDOWS = 256
BOS = 0
GROUP_SIZE = 128
NARROW_GROUP = 64
"""Of weights whose inputs are no multiple of 128 (the first layer of tiny-v2-lite has 704)."""
HERE = Path(__file__).resolve().parent
CACHE = HERE / ".cache"


def shared_dir() -> Path:
    """The folder that holds models/: QUANTKIT_SHARED, else `shared` beside the repository."""
    return Path(os.environ.get("QUANTKIT_SHARED") or HERE.parents[2] / "shared")


def model_dir() -> Path:
    """The model under test: PEERS_MODEL, else tiny-deepseek-v3 of the shared folder."""
    return Path(os.environ.get("PEERS_MODEL") or shared_dir() / "models" / "tiny-deepseek-v3")


# ---------------------------------------------------------------------------------------------------- windows


def chunks(file: Path) -> np.ndarray:
    """Every whole chunk of 511 tokens of one text file, tokenised as one string without specials: (n, 511) int64."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_dir() / "tokenizer.json"))
    ids = tokenizer.encode(file.read_text(encoding="utf-8"), add_special_tokens=False).ids
    width = WINDOW - 1
    n_chunks = len(ids) // width
    return np.asarray(ids[: n_chunks * width], dtype=np.int64).reshape(n_chunks, width)


def spread(file: Path, count: int) -> Tensor:
    """`count` chunks of the file, evenly spread from the first to the last, each after a BOS: (count, 512) int64."""
    rows = chunks(file)
    picked = np.unique(np.linspace(0, len(rows) - 1, count).astype(int))
    assert len(picked) == count, f"{file.name} has {len(rows)} chunks, {count} are wanted"
    bos = np.full((count, 1), BOS, dtype=np.int64)
    return torch.from_numpy(np.concatenate([bos, rows[picked]], axis=1))


def domain_files(part: str) -> list[Path]:
    files = sorted((shared_dir() / "models" / "text" / part).glob("*.txt"))
    assert len(files) == 11, f"{len(files)} domains of text in {part}, 11 are wanted"
    return files


def eval_windows() -> tuple[Tensor, list[str]]:
    """The held-out windows (88, 512) int64 and the domain of each."""
    files = domain_files("eval")
    windows = torch.cat([spread(file, EVAL_PER_DOMAIN) for file in files])
    return windows, [file.stem for file in files for _ in range(EVAL_PER_DOMAIN)]


def calibration_windows(count: int = CALIBRATION_WINDOWS) -> Tensor:
    """(count, 512) int64: the domains in turn (so any prefix is mixed too), the first ones by name get one more."""
    files = domain_files("calibration")
    shares = [count // len(files) + (i < count % len(files)) for i in range(len(files))]
    parts = [spread(file, share) for file, share in zip(files, shares, strict=True)]
    return torch.stack([part[i] for i in range(max(shares)) for part in parts if i < len(part)])


# ---------------------------------------------------------------------------------------------------- weights


def load_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, floats as float32."""
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            weights[name] = tensor.float() if tensor.is_floating_point() else tensor
    return weights


def is_projection(name: str) -> bool:
    """Whether all peers quantise this weight: attention, dense MLP, shared and routed experts; not the router.

    Of DeepSeek V3.2's indexers only the queries: a runtime fuses the others into a module that it never quantises.
    """
    if ".indexer." in name:
        return name.endswith(".wq_b.weight")
    return name.endswith("_proj.weight") or name.endswith("_proj_with_mqa.weight")


def group_size(inputs: int) -> int:
    """Inputs that share a scale, of a weight with so many: 128, or 64 where 128 does not divide them."""
    return NARROW_GROUP if inputs % GROUP_SIZE else GROUP_SIZE


def narrow() -> list[str]:
    """Modules of the model that have groups of 64."""
    weights = load_weights(model_dir())
    names = (name for name, weight in weights.items() if is_projection(name) and weight.shape[-1] % GROUP_SIZE)
    return sorted(name.removesuffix(".weight") for name in names)


def is_routed(name: str) -> bool:
    return ".mlp.experts." in name


def bits_of(name: str, scheme: str) -> int:
    """Bits of one projection under a scheme: int<b> = all of them, mixed = routed experts 4 and the others 8."""
    if scheme == "mixed":
        return 4 if is_routed(name) else 8
    return int(scheme.removeprefix("int"))


def bits_per_weight(weights: Mapping[str, Tensor], scheme: str, scale_bits: int = 16) -> float:
    """Stored bits over the projections, codes and one scale for each group of inputs, divided by their weights."""
    projections = [
        (bits_of(n, scheme) + scale_bits / group_size(w.shape[-1]), w.numel())
        for n, w in weights.items()
        if is_projection(n)
    ]
    return sum(bits * n for bits, n in projections) / sum(n for _, n in projections)


def off_grid(weights: Mapping[str, Tensor], reference: Mapping[str, Tensor], scheme: str) -> list[str]:
    """What is wrong with decoded weights: more than 2^bits values in a group, fewer bits used, a kept tensor moved."""
    faults: list[str] = []
    for name, original in reference.items():
        weight = weights[name]
        if not is_projection(name):
            if not torch.equal(weight, original):
                faults.append(f"{name}: differs from the reference although it is not a projection")
            continue
        groups = weight.reshape(-1, group_size(weight.shape[-1])).sort(dim=1).values
        levels = 1 + (groups.diff(dim=1) != 0).sum(dim=1).max().item()
        allowed = 2 ** bits_of(name, scheme)
        if not allowed // 4 < levels <= allowed:  # a quarter: its fullest group does not fill a grid of 8 bits
            faults.append(f"{name}: {levels} values in its fullest group, the scheme has {allowed}")
    return faults


def rtn(weights: Mapping[str, Tensor], scheme: str) -> dict[str, Tensor]:
    """Round to nearest, symmetric: scale = max|w| / (2^(bits-1) - 1) of each group of inputs, rounded to bfloat16."""
    decoded = dict(weights)
    for name in filter(is_projection, weights):
        top = 2 ** (bits_of(name, scheme) - 1) - 1
        groups = weights[name].reshape(-1, group_size(weights[name].shape[-1]))
        scale = (groups.abs().amax(dim=1, keepdim=True) / top).bfloat16().float()
        codes = (groups / scale.clamp_min(1e-30)).round().clamp(-top - 1, top)
        decoded[name] = (codes * scale).reshape(weights[name].shape)
    return decoded


# ------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True, slots=True)
class Divergence:
    """What a candidate lost against the reference; KLD in nats, the standard error over the windows."""

    kld: float
    kld_se: float
    kld_median: float
    ppl: float
    ppl_reference: float
    top1: float
    kld_windows: list[float]


def fused(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names -> names of transformers' module, which stacks the experts of a layer in two 3-D parameters."""
    out = {name: tensor for name, tensor in weights.items() if not is_routed(name)}
    prefixes = sorted({name.split(".experts.")[0] + ".experts." for name in weights if is_routed(name)})
    for prefix in prefixes:
        n_experts = sum(name.startswith(prefix) and name.endswith(".down_proj.weight") for name in weights)
        part = {k: [weights[f"{prefix}{e}.{k}_proj.weight"] for e in range(n_experts)] for k in ("gate", "up", "down")}
        gate_up = [torch.cat(pair) for pair in zip(part["gate"], part["up"], strict=True)]
        out[f"{prefix}gate_up_proj"] = torch.stack(gate_up)
        out[f"{prefix}down_proj"] = torch.stack(part["down"])
    return out


def build_model(weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """transformers' model of the config in float32 with exactly these weights (strict: none missing, none unused)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_dir())
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(fused(weights), strict=True)
    return model.eval()


@torch.inference_mode()
def window_log_probs(model: PreTrainedModel, windows: Tensor) -> Iterator[Tensor]:
    """Log probabilities (511, vocab) float32 of each window, at the positions that have a next token."""
    for window in windows:
        logits: Tensor = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        yield logits.log_softmax(dim=-1)


def reference_log_probs(weights: Mapping[str, Tensor], windows: Tensor) -> np.ndarray:
    """(88, 511, vocab) float32 of the reference, computed once and kept (1.1 GB) under .cache/."""
    digest = hashlib.sha256(windows.numpy().tobytes())
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].numpy().tobytes())
    path = CACHE / f"reference-{digest.hexdigest()[:16]}.npy"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        vocab = weights["lm_head.weight"].shape[0]
        shape = (len(windows), WINDOW - 1, vocab)
        out = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
        for i, log_probs in enumerate(window_log_probs(build_model(weights), windows)):
            out[i] = log_probs.numpy()
        out.flush()
        partial.rename(path)
    return np.load(path, mmap_mode="r")


def compare(weights: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Divergence:
    """Both weight sets over the 88 windows. KLD(reference || candidate) is summed in float64."""
    windows, domains = eval_windows()
    expected = reference_log_probs(reference, windows)
    klds: list[Tensor] = []
    hits = 0
    losses: dict[str, list[tuple[float, float]]] = {}
    for i, log_q in enumerate(window_log_probs(build_model(weights), windows)):
        log_p = torch.from_numpy(expected[i].copy())
        p = log_p.double().exp()
        klds.append((p * (log_p.double() - log_q.double())).sum(dim=-1))
        hits += int((log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).sum())
        target = windows[i, 1:, None]
        loss = (-log_q.gather(1, target).double().mean().item(), -log_p.gather(1, target).double().mean().item())
        losses.setdefault(domains[i], []).append(loss)
    per_window = torch.stack([kld.mean() for kld in klds])
    per_domain = np.array([np.mean(pairs, axis=0) for pairs in losses.values()])
    ppl, ppl_reference = np.exp(per_domain.mean(axis=0))
    return Divergence(
        kld=per_window.mean().item(),
        kld_se=(per_window.std() / math.sqrt(len(per_window))).item(),
        kld_median=torch.cat(klds).median().item(),
        ppl=float(ppl),
        ppl_reference=float(ppl_reference),
        top1=100 * hits / sum(len(kld) for kld in klds),
        kld_windows=[round(value, 7) for value in per_window.tolist()],
    )


def read_run_note(folder: Path) -> dict[str, Any]:
    """What a peer's script wrote beside the weights (run.json: settings, seconds, versions); empty when absent."""
    path = folder / "run.json"
    return json.loads(path.read_text()) if path.exists() else {}
