"""Seconds of choosing codes with and without an output Hessian, for experts of DeepSeek V3's shapes.

    python benchmarks/two_sided.py                                             # a GPU
    python benchmarks/two_sided.py --device cpu --shrink 4 --experts 2 2       # sides a quarter

Gate and up go as one (B, 4096, 7168) on a GPU, as `quantkit convert` gives them; down is (B, 7168, 2048) with one
output Hessian for all. Of 256 experts, so many at once as an H200 takes: 13 alone, 60 with output Hessians. Factors of
both Hessians are counted. "steps" are those of the rows that hear of each other:
fewer are faster and leave more of the loss. Rows go to results/two_sided.json with --store.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.calibrate.inputs import InputStats
from quantkit.quantizers import Gptq
from quantkit.quantizers.ldlq import rows as row_steps
from quantkit.quantizers.ldlq import two_sided
from quantkit.schemes import GgmlScheme, IntScheme

RESULTS = Path(__file__).resolve().parent / "results" / "two_sided.json"
SCHEMES = {"int4 g128": IntScheme(bits=4, group_size=128), "Q4_K": GgmlScheme(type="Q4_K")}


def moments(count: int, n: int, tokens: int, device: torch.device) -> Tensor:
    """(count, n, n): of correlated values of uneven size."""
    found = torch.empty(count, n, n, device=device)
    mixing = torch.randn(n // 8, n, device=device)
    sizes = torch.randn(n, device=device).mul(0.5).exp()
    for one in found:
        x = (torch.randn(tokens, n // 8, device=device) @ mixing + torch.randn(tokens, n, device=device)) * sizes
        torch.mm(x.T, x, out=one).div_(tokens)
    return found


def seconds(run: Any, device: torch.device, repeats: int) -> float:
    """The median, after a run that compiles; of a processor seconds of its own work, whatever else runs there."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    found: list[float] = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(clock() - start)
    return statistics.median(found[1:])


def measured(
    what: str,
    shape: tuple[int, int],
    counts: tuple[int, int],
    blocks: int,
    shared: bool,
    scheme: Any,
    device: torch.device,
    repeats: int,
) -> dict[str, Any]:
    """One linear, or two as one. ``counts``: experts at once, without and with output Hessians. ``blocks``: of the
    output Hessian, which all experts have in common if ``shared``."""
    rows, columns = shape
    alone, count = counts
    weight = torch.randn(count, rows, columns, device=device).mul_(0.02)
    hessian = moments(count, columns, 1024, device)
    height = rows // blocks
    output = moments((1 if shared else count) * blocks, height, 1024, device).view(-1, blocks, height, height)

    def plain() -> Any:
        return Gptq().quantizer(InputStats(hessian[:alone].clone(), None, (1024,) * alone))(weight[:alone], scheme)

    def aware() -> Any:
        quantize = Gptq(output_aware=True).quantizer(InputStats(hessian.clone(), None, (1024,) * count))
        return quantize(weight, scheme, output_factor=two_sided.factorize_output(output.clone()))

    before, after = seconds(plain, device, repeats), seconds(aware, device, repeats)
    with_output = float(aware().output_loss[:alone].sum())
    error, own = weight[:alone] - plain().decode(), output[:alone]
    across = (own @ error.unflatten(1, (blocks, height))).flatten(1, 2)
    scale = own.diagonal(dim1=-2, dim2=-1).mean((-2, -1))[:, None, None]
    without = float((across.div_(scale) * (error @ hessian[:alone])).sum())
    return {
        "what": what,
        "shape": list(shape),
        "experts at once": list(counts),
        "rows at once": row_steps.rows_at_once(height),
        "plain s, 256 experts": round(before / alone * 256, 2),
        "output-aware s, 256 experts": round(after / count * 256, 2),
        "times": round(after / count * alone / before, 2),
        "loss, output-aware over plain": round(with_output / without, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--experts", type=int, nargs=2, default=[13, 60], help="at once, without and with")
    parser.add_argument("--shrink", type=int, default=1, help="divide both sides by this")
    parser.add_argument("--steps", type=int, nargs="+", default=[row_steps.ROW_STEPS])
    parser.add_argument("--scheme", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--store", action="store_true", help="write results/two_sided.json")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    hidden, inter, counts = 7168 // arguments.shrink, 2048 // arguments.shrink, tuple(arguments.experts)
    pair = 2 if device.type == "cuda" else 1
    rows: list[dict[str, Any]] = []
    for steps in arguments.steps:
        row_steps.ROW_STEPS = steps
        for scheme in arguments.scheme:
            for what, shape, blocks, shared in (
                ("gate and up" if pair == 2 else "gate", (pair * inter, hidden), pair, False),
                ("down", (hidden, inter), 1, True),
            ):
                row = measured(what, shape, counts, blocks, shared, SCHEMES[scheme], device, arguments.repeats)
                rows.append({"scheme": scheme, "steps": steps, **row})
                print(json.dumps(rows[-1]), flush=True)
    if arguments.store:
        name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
        run = {"date": datetime.date.today().isoformat(), "device": name, "torch": torch.__version__}
        RESULTS.write_text(json.dumps({**run, "threads": torch.get_num_threads(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
