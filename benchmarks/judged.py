"""What drivers of whole conversions share: a model and a text by folder, a Fisher pass made once, KLDs by window,
paired changes. For switches.py and target.py; nothing here knows where a workplace keeps its files.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import quantkit
from quantkit.documents.sensitivity import read_sensitivity

CONTEXT = 512
"""Tokens of a calibration row and of a window."""


def add_places(parser: argparse.ArgumentParser) -> None:
    """--model, --text, --fisher and the sizes of what is read from the text."""
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--text", type=Path, required=True, help="folder with calibration/*.txt and eval/*.txt")
    parser.add_argument("--fisher", type=Path, required=True, help="folder of `quantkit sensitivity`; made if missing")
    parser.add_argument("--tokens", type=int, default=131_072, help="of calibration")
    parser.add_argument("--fisher-tokens", type=int, default=32_768, help="of a Fisher pass that is made")
    parser.add_argument("--windows-per-file", type=int, default=8)


def calibration(text: Path, tokens: int) -> dict[str, Any]:
    """The recipe's calibration."""
    return {"data": [f"{text.resolve()}/calibration/*.txt"], "tokens": tokens, "sequence_length": CONTEXT, "seed": 0}


def fisher_pass(folder: Path, model: Path, text: Path, tokens: int) -> dict[str, Any]:
    """Make the pass unless it is there -> its tokens, and the seconds that it took now."""
    start = time.monotonic()
    if not (folder / "sensitivity.json").exists():
        pattern = f"{text.resolve()}/calibration/*.txt"
        quantkit.sensitivity(model, folder, data=pattern, tokens=tokens, sequence_length=CONTEXT)
    return {"fisher_tokens": read_sensitivity(folder).job.tokens, "fisher_s": round(time.monotonic() - start, 1)}


def klds(model: Path, made: Path, text: Path, per_file: int) -> list[float]:
    """Mean KLD of each held-out window, nats per token."""
    found = quantkit.evaluate(
        model, made, text=f"{text.resolve()}/eval/*.txt", context=CONTEXT, max_windows_per_file=per_file,
        noise_floor=False,
    )  # fmt: skip
    (candidate,) = found.candidates
    assert candidate.result.windows is not None
    return list(candidate.result.windows.kld)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over windows, and its standard error."""
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std()) / math.sqrt(len(found))


def change(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Relative change of the mean, and its standard error, paired over windows."""
    mean, _ = mean_and_error(before)
    moved, error = mean_and_error([new - old for old, new in zip(before, after, strict=True)])
    return moved / mean, error / mean


def facts() -> dict[str, Any]:
    """What ran where."""
    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.machine())  # fmt: skip
    return {
        "date": str(datetime.datetime.now(datetime.UTC).date()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip


def store(file: Path | None, row: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Put a row into a file of rows, in place of an older one with the same ``keys``; None: nowhere."""
    if file is None:
        return
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": []}
    others = [old for old in data["rows"] if any(old.get(key) != row[key] for key in keys)]
    data["rows"] = [*others, row]
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
