"""What every peer's script leaves behind: decoded float32 weights and run.json (settings, seconds, versions)."""

from __future__ import annotations

import datetime
import json
import os
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


@dataclass
class Stopwatch:
    """Wall and CPU seconds since it was made; a machine with other work shows in wall, hardly in CPU."""

    wall: float = field(default_factory=time.perf_counter)
    cpu: float = field(default_factory=time.process_time)

    def read(self) -> dict[str, float]:
        """Seconds, and the peak resident memory of the process in GiB."""
        return {
            "seconds": round(time.perf_counter() - self.wall, 1),
            "cpu_seconds": round(time.process_time() - self.cpu, 1),
            "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        }


def write_decoded(
    folder: Path, weights: Mapping[str, Tensor], settings: str, seconds: Mapping[str, float], package: str
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.detach().float().contiguous() for name, tensor in weights.items()}, folder / "decoded.safetensors"
    )
    note: dict[str, Any] = {
        "settings": settings,
        **seconds,
        "run": {
            "date": datetime.date.today().isoformat(),
            "device": cpu_name(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average": round(os.getloadavg()[0], 1),
            "versions": {name: version(name) for name in (package, "torch", "transformers")},
        },
    }
    (folder / "run.json").write_text(json.dumps(note, indent=1) + "\n")
