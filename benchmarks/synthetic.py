"""Random checkpoints of DeepSeek V3's architecture in any size, and conversions of them as measured processes.

Weights are drawn and written in pieces, so a checkpoint may be larger than the memory. The measuring process stays free
of torch: a child's peak memory as the kernel reports it begins with its parent's.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.version import __version__

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
TOKENIZER_FROM = ROOT / "examples" / "nano-deepseek-v3"
PIECE_BYTES = 64 * 2**20
BLOCK = 128


def v3_config(**changes: Any) -> dict[str, Any]:
    """config.json of the 671 B release, with ``changes``."""
    config = json.loads((ROOT / "examples" / "deepseek-v3-671b" / "config.json").read_text())
    return {**config, "bos_token_id": 0, "eos_token_id": 1, **changes}


def write_in_child(folder: Path, config: Mapping[str, Any]) -> None:
    """Write a checkpoint with random weights, tokenizer included, from a process of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER_FROM / name, folder / name)
    subprocess.run([sys.executable, __file__, str(folder)], check=True)


def write_weights(folder: Path) -> None:
    """Random tensors for the folder's config.json: FP8 blocks if it says so, BF16 otherwise."""
    import torch

    from quantkit.arch import arch_of
    from quantkit.formats.safetensors.writer import ShardWriter, layout_shards
    from quantkit.tensors import TensorInfo

    config = json.loads((folder / "config.json").read_text())
    float8 = "quantization_config" in config
    specs = list(arch_of(config).tensors())
    infos: list[tuple[TensorInfo, ...]] = []
    for spec in specs:
        if not (float8 and spec.linear):
            infos.append((TensorInfo(spec.name, spec.shape, "F32" if spec.float32 else "BF16"),))
            continue
        blocks = (-(-spec.shape[0] // BLOCK), -(-spec.shape[1] // BLOCK))
        infos.append(
            (TensorInfo(spec.name, spec.shape, "F8_E4M3"), TensorInfo(f"{spec.name}_scale_inv", blocks, "F32"))
        )
    writer = ShardWriter.open(folder, layout_shards(infos))
    generator = torch.Generator().manual_seed(0)
    for spec, stored in zip(specs, infos, strict=True):
        width = spec.shape[-1]
        rows = max(1, PIECE_BYTES // (4 * width)) if len(spec.shape) == 2 else spec.shape[0]
        n_rows = spec.shape[0]
        # Activations stay near one: embeddings are normal, norms near one, linears shrink with their inputs.
        gain = 1.0 if spec.name.endswith("embed_tokens.weight") else width**-0.5
        at = 0
        for start in range(0, n_rows, rows):
            shape = (min(rows, n_rows - start), *spec.shape[1:])
            noise = torch.randn(shape, generator=generator)
            if len(spec.shape) == 1:
                value = 0.01 * noise if spec.float32 else 1 + 0.1 * noise
            else:
                value = noise.mul_(100.0).clamp_(-448, 448) if len(stored) == 2 else noise.mul_(gain)
            dtype = {"F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32, "BF16": torch.bfloat16}[stored[0].dtype]
            piece = value.to(dtype).view(torch.uint8).numpy().tobytes()
            writer.write(spec.name, at, piece)
            at += len(piece)
        if len(stored) == 2:
            scale = (0.9 + 0.2 * torch.rand(stored[1].shape, generator=generator)) * gain / 100
            writer.write(stored[1].name, 0, scale.numpy().tobytes())
    writer.finish()


def convert(
    source: Path, recipe: Path, out: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """`quantkit convert ... --json` in a process of its own -> command, seconds, peak RSS by wait4, its report."""
    shown = ["quantkit", "convert", source.name, "-r", recipe.name, "-o", out.name, *arguments]
    script = "import sys; from quantkit.cli.app import main; sys.argv[0] = 'quantkit'; main()"
    command = [sys.executable, "-c", script, "convert", str(source), "-r", str(recipe), "-o", str(out), *arguments]
    start = time.monotonic()
    with (out.with_suffix(".json")).open("wb") as stdout:
        process = subprocess.Popen(
            [*command, "--json"], stdout=stdout, cwd=ROOT, env={**os.environ, **(environment or {})}
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(shown)}: exit code {process.returncode}")
    return {
        "command": " ".join(shown),
        "seconds": round(time.monotonic() - start, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "report": json.loads(out.with_suffix(".json").read_text()),
    }


def machine() -> dict[str, Any]:
    """What a result must name: device, versions, date."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "device": model,
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "quantkit": __version__,
    }


def write_result(name: str, result: Mapping[str, Any]) -> None:
    """benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    write_weights(Path(sys.argv[1]))
