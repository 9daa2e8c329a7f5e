"""Train nano-deepseek-v3 from random weights and write its BF16 form.

    python tools/nano_text.py --cache CACHE --work TOKENS                      # text, tokenizer, tokens (CPU, minutes)
    python tools/train_nano.py TOKENS OUT --steps 17000 --rate 5e-3            # one GPU, minutes
    python tools/train_nano.py TOKENS OUT --steps 5 --batch 2 --length 64      # smoke run on a CPU, seconds
    python tools/fp8_cast.py to-fp8 OUT examples/nano-deepseek-v3 --shard-bytes 2500000

Needs torch and safetensors only. The weights are not reproducible bit for bit (GPU kernels), the run is: seed, text
and schedule. Method: AdamW, constant learning rate after a warm-up, then linearly to zero; bf16 autocast over float32
weights; expert load balanced by the selection bias as in DeepSeek-V3 (arXiv 2412.19437, 2.1.2) plus its sequence-wise
loss with a tiny factor; the MTP layer's loss with factor 0.3, then 0.1.
"""

from __future__ import annotations

import argparse
import json
import lzma
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from nano_model import Config, DeepseekV3, official_tensors
from safetensors.torch import save_file
from torch import Tensor

MIX = {
    "prose": 1.4,
    "code": 1.6,
    "techdoc": 1.3,
    "german": 0.9,
    "french": 0.9,
    "chinese": 1.2,
    "arithmetic": 0.7,
    "chat": 0.8,
}
BOS_ID = 0
EVAL_WINDOWS = 8


@dataclass(frozen=True)
class Schedule:
    steps: int
    batch: int = 32
    length: int = 1024
    peak_rate: float = 3e-3
    warmup: int = 250
    constant_until: float = 0.35  # fraction of the run
    weight_decay: float = 0.1
    clip: float = 1.0
    bias_step: float = 2e-3
    balance_factor: float = 1e-4
    seed: int = 1

    def rate(self, step: int) -> float:
        start = self.constant_until * self.steps
        falling = 1.0 if step < start else (self.steps - step) / (self.steps - start)
        return self.peak_rate * min(1.0, (step + 1) / min(self.warmup, self.steps)) * falling

    def bias_rate(self, step: int) -> float:
        """The bias stops moving between 60 % and 95 % of the run, so that the final weights fit the final routing."""
        return self.bias_step * min(1.0, max(0.0, (0.95 - step / self.steps) / 0.35))

    def mtp_factor(self, step: int) -> float:
        return 0.3 if step < 0.7 * self.steps else 0.1


class Streams:
    """Token streams of all domains, end to end on the device, and random windows of them."""

    def __init__(self, folder: Path, names: list[str], device: torch.device, seed: int) -> None:
        parts = [read_stream(folder / f"{name}.u16.xz") for name in names]
        sizes = torch.tensor([part.numel() for part in parts])
        self.tokens = torch.cat(parts).to(device)
        self.sizes, self.starts = sizes.to(device), (sizes.cumsum(0) - sizes).to(device)
        self.weights = torch.tensor([MIX[name] for name in names], device=device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def batch(self, count: int, length: int) -> Tensor:
        """(count, length) int64; every second window begins with BOS."""
        device = self.tokens.device
        domain = torch.multinomial(self.weights, count, replacement=True, generator=self.generator)
        place = torch.rand(count, generator=self.generator, device=device, dtype=torch.float64)
        first = self.starts[domain] + (place * (self.sizes[domain] - length)).long()
        windows = self.tokens[first[:, None] + torch.arange(length, device=device)].long()
        windows[::2] = torch.cat((torch.full_like(windows[::2, :1], BOS_ID), windows[::2, :-1]), 1)
        return windows


def read_stream(path: Path) -> Tensor:
    return torch.frombuffer(bytearray(lzma.decompress(path.read_bytes())), dtype=torch.int16)


def losses(model: torch.nn.Module, windows: Tensor, mtp_factor: Tensor, balance_factor: float) -> tuple[Tensor, ...]:
    """(total, next-token loss, MTP loss, loads) of windows (batch, length + 2)."""
    length = windows.shape[1] - 2
    output = model(windows[:, :length], windows[:, 1 : length + 1])
    main = F.cross_entropy(output.logits.float().flatten(0, 1), windows[:, 1 : length + 1].flatten())
    if output.mtp_logits is None:
        return main + balance_factor * output.balance, main, main, torch.stack(output.loads)
    mtp = F.cross_entropy(output.mtp_logits.float().flatten(0, 1), windows[:, 2:].flatten())
    return main + mtp_factor * mtp + balance_factor * output.balance, main, mtp, torch.stack(output.loads)


def optimizer_for(model: DeepseekV3, schedule: Schedule) -> torch.optim.AdamW:
    matrices = [value for value in model.parameters() if value.ndim > 1]
    vectors = [value for value in model.parameters() if value.ndim == 1]
    groups = [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=schedule.peak_rate, betas=(0.9, 0.95), fused=True)


@torch.no_grad()
def held_out_losses(
    model: DeepseekV3, folder: Path, device: torch.device, context: int = 512
) -> dict[str, tuple[float, float]]:
    """Domain -> (next-token loss, MTP loss) in nats over up to EVAL_WINDOWS windows BOS + 511 tokens, float32."""
    result: dict[str, tuple[float, float]] = {}
    for path in sorted(folder.glob("eval_*.u16.xz")):
        tokens = read_stream(path).long()
        windows = tokens[: tokens.numel() // (context - 1) * (context - 1)].view(-1, context - 1)
        chosen = torch.linspace(0, len(windows) - 1, EVAL_WINDOWS).long().unique()
        batch = F.pad(windows[chosen], (1, 0), value=BOS_ID).to(device)
        output = model(batch[:, :-1], batch[:, 1:])
        main = F.cross_entropy(output.logits.flatten(0, 1), batch[:, 1:].flatten())
        if output.mtp_logits is None:
            result[path.name.split(".")[0].removeprefix("eval_")] = (main.item(), main.item())
            continue
        mtp = F.cross_entropy(output.mtp_logits[:, :-1].flatten(0, 1), batch[:, 2:].flatten())
        result[path.name.split(".")[0].removeprefix("eval_")] = (main.item(), mtp.item())
    return result


def train(model: DeepseekV3, streams: Streams, schedule: Schedule, compile_model: bool) -> list[list[float]]:
    """Train in place; returns rows of (step, loss, MTP loss, smallest and largest load x experts)."""
    optimizer = optimizer_for(model, schedule)
    step_losses = torch.compile(losses) if compile_model else losses
    device = streams.tokens.device
    biases = [layer.bias for layer in model.moe_layers()]
    rows: list[list[float]] = []
    started = time.perf_counter()
    mtp_factor = torch.zeros((), device=device)
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        mtp_factor.fill_(schedule.mtp_factor(step))
        windows = streams.batch(schedule.batch, schedule.length + 2)
        with torch.autocast(device.type, torch.bfloat16):
            total, main, mtp, loads = step_losses(model, windows, mtp_factor, schedule.balance_factor)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.clip, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for bias, load in zip(biases, loads, strict=True):
                bias += schedule.bias_rate(step) * (load.mean() - load).sign()
        if step % 250 == 0 or step == schedule.steps - 1:
            share = loads * loads.shape[1]
            rows.append([step, main.item(), mtp.item(), share.min().item(), share.max().item()])
            rate = (step + 1) / (time.perf_counter() - started)
            print(
                "step {} loss {:.4f} mtp {:.4f} load {:.2f}..{:.2f}".format(*rows[-1]),
                f"{rate:.1f} steps/s",
                flush=True,
            )
    return rows


def write_bf16(model: DeepseekV3, config: Config, model_folder: Path, out: Path, shards: int = 3) -> None:
    """BF16 shards under official names, index, config without quantization_config, tokenizer and generation files."""
    tensors = official_tensors(model)
    total = sum(value.nbytes for value in tensors.values())
    weight_map: dict[str, str] = {}
    done = 0
    for name, value in tensors.items():
        weight_map[name] = f"model-{min(done * shards // total, shards - 1) + 1:05d}-of-{shards:06d}.safetensors"
        done += value.nbytes
    for file in sorted(set(weight_map.values())):
        save_file({n: v for n, v in tensors.items() if weight_map[n] == file}, out / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    (out / "config.json").write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (model_folder / name).is_file():
            shutil.copyfile(model_folder / name, out / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path, help="folder of token streams that nano_text.py wrote")
    parser.add_argument("out", type=Path, help="new folder for the BF16 checkpoint and training.json")
    parser.add_argument(
        "--model", type=Path, default=Path("examples/nano-deepseek-v3"), help="folder of config.json and tokenizer"
    )
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    schedule = Schedule(arguments.steps, arguments.batch, arguments.length, arguments.rate, seed=arguments.seed)
    config = json.loads((arguments.model / "config.json").read_text(encoding="utf-8"))
    torch.manual_seed(schedule.seed)
    torch.set_float32_matmul_precision("high")
    model = DeepseekV3(config).to(device)
    streams = Streams(arguments.tokens, list(MIX), device, schedule.seed)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {streams.tokens.numel():,} tokens, {device}",
        flush=True,
    )
    started = time.perf_counter()
    rows = train(model, streams, schedule, compile_model=device.type == "cuda")
    seconds = time.perf_counter() - started
    torch.set_float32_matmul_precision("highest")
    held_out = held_out_losses(model, arguments.tokens, device)
    for domain, (main_loss, mtp_loss) in held_out.items():
        print(f"held out {domain:12} loss {main_loss:.4f} mtp {mtp_loss:.4f}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_bf16(model, config, arguments.model, arguments.out)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    record = {
        "schedule": asdict(schedule),
        "mix": MIX, "device": name, "torch": torch.__version__, "seconds": round(seconds, 1),
        "tokens": schedule.steps * schedule.batch * schedule.length, "corpus_tokens": streams.tokens.numel(),
        "curve": rows, "held_out_nats_next_and_mtp": held_out,
    }  # fmt: skip
    (arguments.out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
