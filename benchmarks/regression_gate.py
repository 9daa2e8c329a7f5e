"""Does `quantkit check` pass what is clean and fail what is broken?

    python benchmarks/regression_gate.py WORK [--seeds 20] [--bug-seeds 0 1 2]

Converts examples/nano-deepseek-v3 by tests/baselines/nano.yaml with other calibration seeds (other tokens, so other
codes) and with bugs planted in the running program or in the written files, evaluates each with the options of `make
gate`, and checks all of them against the conversion with seed 0. WORK keeps evaluations and quantkit.json: a second
call only judges. Writes results/regression_gate.json. Exits with 1 on a false alarm or a bug that was never seen.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from unittest import mock

import numpy as np
import torch

from quantkit import convert, evaluate
from quantkit.documents.baseline import Baseline
from quantkit.evaluate.check.baseline import by_name, read_evaluation, read_losses, windows_of
from quantkit.evaluate.check.run import check
from quantkit.evaluate.check.statistics import paired
from quantkit.evaluate.check.verdict import Limits
from quantkit.formats.gguf.reader import GgufReader
from quantkit.plan.recipe import Recipe
from quantkit.quantizers.ldlq import factor as ldlq_factor
from quantkit.schemes import affine_int
from quantkit.schemes.ggml import scheme as ggml

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "examples" / "nano-deepseek-v3"
RECIPE = ROOT / "tests" / "baselines" / "nano.yaml"
CONTEXT, WINDOWS = 256, 16
OUTPUTS = ("w4a16", "Q4_K_M")
LIMITS_FROM = 20
"""The spreads in `Limits` were set when seeds up to this one had been run."""
LAYER, EXPERT = 1, 5
"""The expert that is damaged."""


# ---------------------------------------------------------------------------------------------------------- the bugs


@contextmanager
def no_act_order() -> Iterator[None]:
    """GPTQ rounds columns as they are stored, whatever the recipe says."""
    real = ldlq_factor.factorize

    def factorize(hessian: torch.Tensor, damp_percent: float, *, act_order: bool, damped: float = 0.0) -> Any:
        return real(hessian, damp_percent, act_order=False, damped=damped)

    with mock.patch.object(ldlq_factor, "factorize", factorize):
        yield


def with_significand(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Rounded to so many bits of significand."""
    mantissa, exponent = torch.frexp(values.float())
    return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)


@contextmanager
def coarse_scales_stored() -> Iterator[None]:
    """Scales lose half of their bits on the way into the file: 4 of bfloat16's 8, 3 of a k-quant's 6."""
    stored, multiples = affine_int.IntGrid.stored, ggml._multiples

    def coarse(self: Any, codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None) -> Any:
        return stored(self, codes, with_significand(scale, 4), offset)

    def eighths(values: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
        return (multiples(values, units).float() / 8).round().mul(8).clamp(-56, 56).to(torch.int16)

    with mock.patch.object(affine_int.IntGrid, "stored", coarse), mock.patch.object(ggml, "_multiples", eighths):
        yield


@contextmanager
def coarse_scales_known() -> Iterator[None]:
    """Integer scales have 4 bits, and the codes are chosen for that: the mildest form of the bug."""
    real = affine_int.representable

    def representable(scheme: Any, scale: torch.Tensor) -> torch.Tensor:
        return with_significand(real(scheme, scale), 4)

    with mock.patch.object(affine_int, "representable", representable):
        yield


Damage = Callable[["np.ndarray[Any, Any]"], "np.ndarray[Any, Any]"]
"""Scales of a matrix (rows, scales of a row) float32 -> what is written in their place."""


def slipped(scales: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Each row has the next one's scales."""
    return np.roll(scales, -1, axis=0)


def shrunk(scales: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A tenth too small."""
    return scales * 0.9


def damage_expert(out: Path, damage: Damage) -> None:
    """Change the scales of one expert's down projection in the files that were written."""
    folder, name = out / "w4a16", f"model.layers.{LAYER}.mlp.experts.{EXPERT}.down_proj.weight_scale"
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    shard = folder / index["weight_map"][name]
    data = bytearray(shard.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    entry = json.loads(data[8 : 8 + length])[name]
    start, stop = (8 + length + offset for offset in entry["data_offsets"])
    scales = torch.frombuffer(data, dtype=torch.bfloat16, count=(stop - start) // 2, offset=start)
    changed = damage(scales.float().view(entry["shape"]).numpy())
    scales.copy_(torch.from_numpy(changed.copy()).flatten())
    shard.write_bytes(data)
    damage_gguf(out / "Q4_K_M", damage)


def damage_gguf(folder: Path, damage: Damage) -> None:
    """d (and dmin) of every block of Q4_K or Q6_K."""
    with GgufReader(folder) as reader:
        entry = reader.tensors[f"blk.{LAYER}.ffn_down_exps.weight"]
    nbytes, place = {"Q4_K": (144, slice(0, 4)), "Q6_K": (210, slice(208, 210))}[entry.kind]
    path = folder / entry.file
    data = bytearray(path.read_bytes())
    blocks = np.frombuffer(data, np.uint8, entry.nbytes, entry.offset).reshape(*entry.shape[:2], -1, nbytes)
    halves = np.ascontiguousarray(blocks[EXPERT][..., place]).view(np.float16)
    blocks[EXPERT][..., place] = damage(halves.astype(np.float32)).astype(np.float16).view(np.uint8)
    path.write_bytes(data)


PLANTED: dict[str, Callable[[], Any]] = {
    "act-order dropped": no_act_order,
    "scales stored with half their bits": coarse_scales_stored,
    "integer scales of half the bits, codes chosen for them": coarse_scales_known,
}
DAMAGED: dict[str, Damage] = {
    "scales of one expert slipped by a row": slipped,
    "scales of one expert a tenth too small": shrunk,
}


# ---------------------------------------------------------------------------------------------------------- the runs


def run(work: Path, bug: str, seed: int) -> Path:
    """Convert and evaluate, unless that was done -> evaluation.json; beside it the folders' quantkit.json stay."""
    folder = work / f"{bug or 'clean'} {seed}".replace(" ", "-").replace(",", "")
    done = folder / "evaluation.json"
    if done.exists():
        return done
    shutil.rmtree(folder, ignore_errors=True)
    recipe = Recipe.from_yaml(RECIPE)
    assert recipe.calibration is not None
    recipe = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"seed": seed})})
    start = time.perf_counter()
    with PLANTED.get(bug, nullcontext)():
        convert(NANO, recipe, folder, device="cpu")
    if bug in DAMAGED:
        damage_expert(folder, DAMAGED[bug])
    found = evaluate(
        NANO,
        [folder / name for name in OUTPUTS],
        context=CONTEXT,
        max_windows_per_file=WINDOWS,
        noise_floor=False,
        device="cpu",
    )
    for file in folder.glob("*/*"):
        if file.name != "quantkit.json":
            file.unlink()
    (folder / "commit").write_text(commit(), encoding="utf-8")
    done.write_text(found.to_json(), encoding="utf-8")
    print(f"{bug or 'clean'}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    return done


def commit() -> str:
    """Of this checkout."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


# ------------------------------------------------------------------------------------------------------- the judgement


def judged(path: Path, baseline: Baseline, limits: Limits) -> dict[str, list[dict[str, str]]]:
    """By output what got worse, as `quantkit check` says it."""
    found = read_evaluation(path)
    verdicts = check(found, baseline, limits, read_losses(found, Path()))
    return {
        verdict.candidate: [{"check": failed.name, "line": failed.line} for failed in verdict.regressions]
        for verdict in verdicts
    }


def changes(path: Path, baseline: Baseline, outputs: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of the mean KLD, relative, with the standard error of the pairs."""
    then, now = by_name(baseline.evaluation), by_name(read_evaluation(path))
    pairs = {output: paired(windows_of(then[output]).kld, windows_of(now[output]).kld) for output in outputs}
    return {
        output: {"change": round(pair.change / pair.was, 4), "standard error": round(pair.standard_error / pair.was, 4)}
        for output, pair in pairs.items()
    }


def alarms_of_pairs(clean: Sequence[Path], limits: Limits) -> dict[str, int]:
    """Each clean run as the baseline of each other one: not independent, but twenty times as many."""
    sides = [(found, read_losses(found, Path())) for found in map(read_evaluation, clean)]
    pairs = [(was, found) for was in sides for found in sides if was is not found]
    alarms = [
        check(found[0], Baseline(evaluation=was[0], conversions=was[1]), limits, found[1]) for was, found in pairs
    ]
    return {
        "pairs": len(pairs),
        "with an alarm": sum(not all(verdict.passed for verdict in verdicts) for verdicts in alarms),
        "checks": sum(len(verdict.checks) for verdicts in alarms for verdict in verdicts),
    }


def spreads(clean: Sequence[Path]) -> dict[str, dict[str, float]]:
    """Relative standard deviation from seed to seed of what limits are made of, the text's part taken off: of all
    pairs of clean runs the mean of (difference^2 - SE^2) / 2."""
    documents = [read_evaluation(path) for path in clean]
    result: dict[str, dict[str, float]] = {}
    for output in OUTPUTS:
        windows = [windows_of(by_name(document)[output]) for document in documents]
        domains = documents[0].window_domains
        kld = fmean(fmean(own.kld) for own in windows)
        found = {
            "mean KLD": luck([own.kld for own in windows]) / kld,
            "mean loss, of the mean KLD": luck([own.loss for own in windows]) / kld,
        }
        for domain in dict.fromkeys(domains):
            rows = [row for row, other in enumerate(domains) if other == domain]
            values = [[own.kld[row] for row in rows] for own in windows]
            found[f"KLD of {domain}, of the mean KLD"] = luck(values) / kld
        for layer in range(len(windows[0].layers)):
            values = [own.layers[layer] for own in windows]
            found[f"squared hidden error behind layer {layer}"] = luck(values) / fmean(map(fmean, values))
        result[output] = {name: round(value, 5) for name, value in found.items()}
    return result


def luck(runs: Sequence[Sequence[float]]) -> float:
    """Absolute; 0 where the text explains all."""
    pairs = [paired(was, found) for at, was in enumerate(runs) for found in runs[at + 1 :]]
    return math.sqrt(max(0.0, fmean((pair.change**2 - pair.standard_error**2) / 2 for pair in pairs)))


def loss_spreads(clean: Sequence[Path]) -> dict[str, dict[str, float]]:
    """Standard deviation from seed to seed of the log loss of linears: what a kind has in common, and of one linear
    against its kind, on average over the kind's linears and of the linear that varies most."""
    result: dict[str, dict[str, float]] = {}
    for output in OUTPUTS:
        losses = [read_losses(read_evaluation(path), Path())[output].losses for path in clean]
        kinds: dict[str, list[str]] = {}
        for name, loss in losses[0].items():
            if loss > 0:
                kinds.setdefault(".".join(part for part in name.split(".") if not part.isdigit()), []).append(name)
        common: list[float] = []
        average: list[float] = []
        most: list[float] = []
        for names in kinds.values():
            table = np.log([[run[name] for name in names] for run in losses])
            mean = table.mean(1)
            own = (table - mean[:, None]).std(0, ddof=1)
            single = float(np.sqrt((own**2).mean()))
            variance = float(mean.var(ddof=1)) - single**2 / len(names)
            common.append(math.sqrt(max(0.0, variance)))
            if len(names) > 1:
                average.append(single)
                most.append(float(own.max()))
        result[output] = {
            "common to a kind, largest": round(max(common), 5),
            "of a linear of a kind, largest kind": round(max(average), 5),
            "of the linear that varies most": round(max(most), 5),
        }
    return result


def touched(bug: str) -> tuple[str, ...]:
    """Outputs that a bug is in: k-quants have no integer scales."""
    return OUTPUTS[:1] if bug.startswith("integer scales") else OUTPUTS


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("work", type=Path)
    arguments.add_argument("--seeds", type=int, default=20, help="clean runs beside the baseline's")
    arguments.add_argument("--bug-seeds", type=int, nargs="*", default=[0, 1, 2])
    arguments.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "regression_gate.json")
    given = arguments.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    clean = [run(given.work.absolute(), "", seed) for seed in range(given.seeds + 1)]
    first = read_evaluation(clean[0])
    baseline, limits = Baseline(evaluation=first, conversions=read_losses(first, Path())), Limits()

    alarms = {path.parent.name: judged(path, baseline, limits) for path in clean[1:]}
    bugs = {
        bug: {str(seed): judged(run(given.work.absolute(), bug, seed), baseline, limits) for seed in given.bug_seeds}
        for bug in (*PLANTED, *DAMAGED)
    }
    false_alarms = sum(any(found.values()) for found in alarms.values())
    caught = {
        bug: {output: sum(bool(found[output]) for found in runs.values()) for output in touched(bug)}
        for bug, runs in bugs.items()
    }
    document = {
        "what": "quantkit check on nano-deepseek-v3: conversions with other calibration seeds, and with planted bugs, "
        "against the conversion with seed 0",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": platform.processor() or platform.machine(),
        "commits": sorted(
            {path.with_name("commit").read_text(encoding="utf-8") for path in given.work.glob("*/commit")}
        ),
        "versions": first.versions,
        "windows": len(first.window_domains),
        "limits": asdict(limits),
        "clean": {
            "runs": len(alarms),
            "false alarms": false_alarms,
            "seeds after the limits were set": f"{LIMITS_FROM + 1} to {given.seeds}",
            "every run against every other": alarms_of_pairs(clean, limits),
            "lines": {name: found for name, found in alarms.items() if any(found.values())},
            "mean KLD": {
                output: {"mean": round(fmean(values), 6), "std": round(stdev(values), 6)}
                for output in OUTPUTS
                for values in [[by_name(read_evaluation(path))[output].result.overall.kld.mean for path in clean]]
            },
            "spread from seed to seed, relative": spreads(clean),
            "spread of log losses": loss_spreads(clean),
        },
        "bugs": {
            bug: {
                "runs": len(runs),
                "caught": caught[bug],
                "mean KLD with seed 0": changes(run(given.work.absolute(), bug, 0), baseline, touched(bug)),
                "by": {
                    output: sorted({line["check"] for found in runs.values() for line in found[output]})
                    for output in touched(bug)
                },
                "lines with seed 0": {output: [line["line"] for line in runs["0"][output]] for output in touched(bug)},
            }
            for bug, runs in bugs.items()
        },
    }
    given.out.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{false_alarms} false alarms in {len(alarms)} clean runs")
    for bug, found in caught.items():
        print(f"{bug}: caught in {found} of {len(given.bug_seeds)} runs each")
    return int(false_alarms > 0 or not all(all(found.values()) for found in caught.values()))


if __name__ == "__main__":
    sys.exit(main())
