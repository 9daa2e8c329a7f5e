"""Documents as conversions and evaluations leave them, with made-up numbers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

DIGEST = "8e6bad25cfc0f87387d0ccc73c534270ef7148df2041deee6c1af1e40898f148"
LINEARS = ("self_attn.q_a_proj", "self_attn.o_proj", "mlp.shared_experts.up_proj")


def mean(value: float, error: float | None = 0.01) -> dict[str, float | None]:
    return {"mean": value, "standard_error": error}


def conversion(
    *, layers: int = 3, experts: int = 4, source: str = "nano", nbytes: int = 4_000_000, kld: float | None = 0.02
) -> dict[str, Any]:
    """quantkit.json: layer 0 is dense, expert 1 of layer 1 saw nothing."""
    chance = random.Random(0)
    tensors: dict[str, Any] = {"lm_head.weight": linear(0.001, 0)}
    tokens: dict[str, Any] = {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in LINEARS:
            tensors[f"{prefix}{name}.weight"] = linear(1e-5 * (1 + layer), 1000)
        if layer:
            counts = [0 if (layer, e) == (1, 1) else chance.randrange(50, 5000) for e in range(experts)]
            tokens[str(layer)] = {"experts": [[count, 0.5 * count, 0 if count else 128] for count in counts]}
            for e, count in enumerate(counts):
                name = f"{prefix}mlp.experts.{e}.down_proj.weight"
                tensors[name] = linear(0.001 * (1 + e), count, "rtn: no tokens" if not count else "")
    rows = [("expert", "int4 g128 gptq", 8, 6_000_000, 3_000_000), ("embed", "bf16", 1, 500_000, 1_000_000)]
    rows.append(("mtp", "dropped", 4, 1_000_000, 0))
    return {
        "quantkit": "0.1.0",
        "job": {"quantkit version": "0.1.0", "source": DIGEST, "imatrix": None, "device": "cpu", "threads": 2},
        "recipe": {"version": 1, "outputs": [{"name": "w4", "format": "compressed-tensors"}]},
        "source": source,
        "output": "w4",
        "validated": True,
        "validation": None if kld is None else validation(kld),
        "tensor_bytes": nbytes,
        "bpw": 4.923,
        "contents": [
            dict(zip(("role", "stored_as", "tensors", "parameters", "nbytes"), row, strict=True)) for row in rows
        ],
        "calibration": [{"file": "a.txt", "sha256": DIGEST, "documents": 1, "tokens": 4096, "rows": 16}],
        "expert_tokens": tokens,
        "tensors": tensors,
        "sha256": {"model.safetensors": DIGEST},
    }


def linear(loss: float, tokens: int, fallback: str = "") -> dict[str, Any]:
    scheme = {"kind": "int", "bits": 4, "group_size": 128, "symmetric": True}
    return {"scheme": scheme, "relative_loss": loss, "n_tokens": tokens, **({"fallback": fallback} if fallback else {})}


def validation(kld: float) -> dict[str, Any]:
    scores = {
        "windows": 8,
        "tokens": 2040,
        "reference_perplexity": mean(6.5, 0.5),
        "candidate_perplexity": mean(6.5 * math.exp(kld), 0.5),
        "perplexity_ratio": mean(math.exp(kld), 0.002),
        "mean_kl": mean(kld, 0.001),
        "median_kl": kld / 2,
        "p99_kl": 8 * kld,
        "top1": mean(0.93),
    }
    return {"output": "w4", "scores": scores, "problems": []}


def scores(kld: float, tokens: int = 4000) -> dict[str, Any]:
    return {
        "windows": 8,
        "tokens": tokens,
        "reference_perplexity": mean(6.5, 0.5),
        "perplexity": mean(6.5 * math.exp(kld), 0.5),
        "log_ratio": mean(kld, 0.002),
        "kld": {
            **mean(kld, kld / 10),
            **{"median": kld / 2, "p90": 2 * kld, "p99": 8 * kld, "p999": 20 * kld, "max": 40 * kld},
        },
        "same_top": mean(0.93),
        "rms_probability_change": mean(0.05),
    }


def evaluation(candidates: dict[str, tuple[int, float]], *, floor: float | None = 1e-5) -> dict[str, Any]:
    """evaluation.json. ``candidates``: path -> (bytes, mean KLD)."""
    return {
        "kind": "quantkit evaluation",
        "schema_version": 1,
        "versions": {"quantkit": "0.1.0", "torch": "2.13.0"},
        "device": "cpu",
        "arithmetic": "float32",
        "protocol": {
            "name": "windows",
            "description": "BOS first.",
            "context": 512,
            "max_windows_per_file": 4,
            "scored_per_window": 511,
        },
        "text": [
            {"file": f"builtin:eval/{d}.txt", "sha256": DIGEST, "documents": 1, "tokens": 900, "windows": 4}
            for d in ("code", "prose")
        ],
        "tokens_sha256": DIGEST,
        "reference": model("nano", 11_000_000),
        "noise_floor": None if floor is None else {"rounding": "bfloat16", "result": result(floor)},
        "candidates": [{"model": model(path, size), "result": result(kld)} for path, (size, kld) in candidates.items()],
        "seconds": None,
    }


def model(path: str, nbytes: int) -> dict[str, Any]:
    return {
        "name": Path(path).name,
        "path": path,
        "format": "compressed-tensors",
        "fingerprint": DIGEST,
        "weights": 6_500_000,
        "nbytes": nbytes,
        "notes": [],
    }


def result(kld: float) -> dict[str, Any]:
    experts = {"expert_tokens": [100, 0, 300], "expert_errors": [kld, None, 2 * kld]}
    layers = [
        {"layer": n, "hidden_error": kld * (n + 1), "router_agreement": 0.99 if n else None, **(experts if n else {})}
        for n in range(3)
    ]
    return {
        "overall": scores(kld),
        "domains": {"code": scores(0.5 * kld, 2000), "prose": scores(1.5 * kld, 2000)},
        "layers": layers,
    }


def written(folder: Path, document: dict[str, Any], name: str = "quantkit.json") -> Path:
    """The document as a file of a folder, which is made. Returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(document), encoding="utf-8")
    return path
