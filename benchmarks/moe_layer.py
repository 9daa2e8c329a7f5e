"""One real MoE layer of DeepSeek V3 on one GPU, with the code that `quantkit convert` runs: seconds, memory, rates.

    python benchmarks/moe_layer.py [--tokens 524288] [--folder /dev/shm/moe-layer] [--peers] [--out FILE]

The layer (256 experts of 7168 x 2048, attention of 128 heads, shared expert) is written as a safetensors folder in FP8
blocks: heavy-tailed random weights, a router whose bias is balanced as DeepSeek balances it. The hidden states are
synthetic: correlated, with outlier channels and tokens of very different size. A layer's seconds go from the hidden
states before it to the hidden states after it and to the last packed byte in the output files; source and output lie
in memory (--folder), so a disk's time comes on top where it is slower than the computation.

Cases: GPTQ int4 g128 with activation order and the weighted scale search (what the peers do); the same with the cross
term (an unquantised stream goes along); and the default, which adds coordinate descent. Stage times come from a run of
their own with a synchronisation around every stage; their sum is a little more than the layer's time.
`--peers` runs gptqmodel's and llm-compressor's own functions on one of the experts in the same process
(`benchmarks/peers/on_gpu.py`). `--scale 8` divides the sizes, to try the script anywhere with a GPU.

On several GPUs, a rank each:

    torchrun --nproc-per-node 2 benchmarks/moe_layer.py --out results/moe_layer_ranks.json

Each has its share of the tokens, and seconds are those of the slowest. The result names the sha256 of the files, which
does not depend on the number of ranks; stages say what is exchanged between ranks, and how long each waits for others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from gptq_expert import machine, structured_weight, write
from layer_work import Sizes, stage_rates
from torch import Tensor
from torch import distributed as dist

from quantkit.arch import arch_of
from quantkit.arch.base import ExpertBlock, ModelArch
from quantkit.calibrate.chunk_sizes import OwnRows, own_rows
from quantkit.calibrate.hidden_states import MemoryRows, RowStore
from quantkit.calibrate.stream import row_batches
from quantkit.convert import dense, experts, layer
from quantkit.convert import outputs as outputs_module
from quantkit.convert.background import AheadSource, Deliveries, foreground
from quantkit.convert.exchange import ExchangedBatch
from quantkit.convert.experts import ExpertOutputs
from quantkit.convert.hidden import Streams
from quantkit.convert.layer import quantize_layer
from quantkit.convert.layer_job import LayerJob
from quantkit.convert.outputs import Importance, OutputChoice, Quantised
from quantkit.convert.weights import LayerWeights
from quantkit.formats import open_source
from quantkit.formats.folder import FolderSink
from quantkit.formats.layouts.compressed_tensors import COMPRESSED_TENSORS
from quantkit.formats.model_source import ModelSource
from quantkit.formats.planned import PlannedTensor
from quantkit.formats.safetensors.writer import ShardWriter, layout_shards
from quantkit.plan.batch_sizes import share_of
from quantkit.plan.hardware import default_budget
from quantkit.plan.headers import headers_of
from quantkit.plan.machine import Machine
from quantkit.plan.memory import conversion_needs
from quantkit.plan.plan import Plan, make_plan
from quantkit.plan.recipe import Recipe
from quantkit.quantizers.gptq import Gptq
from quantkit.quantizers.ldlq import factor as ldlq_factor
from quantkit.quantizers.ldlq import polish as ldlq_polish
from quantkit.quantizers.ldlq import sweep as ldlq_sweep
from quantkit.ranks.connect import connected
from quantkit.ranks.places import place_of
from quantkit.ranks.ranks import ALONE, Ranks
from quantkit.schemes import IntScheme
from quantkit.tensors import TensorInfo, TensorSpec

GPU = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
SCHEME = IntScheme(bits=4, group_size=128)
LENGTH = 2048
BLOCK = 128
MOE_LAYERS = 58
EXPERTS = 256
CASES = {
    "gptq": Gptq(cross=0, polish=0),
    "gptq with the cross term": Gptq(polish=0),
    "default: cross term and 2 rounds of polish": Gptq(),
}
SUMS = "ranks: sums of moments, in turn"
RANK_STAGES = {
    "exchange": "ranks: tokens of experts and what they add, all to all",
    "shared": "ranks: quantised dense weights to all",
    "send": SUMS,
    "receive": SUMS,
}


# The layer


def layer_config(scale: int) -> dict[str, Any]:
    """V3's config.json with one MoE layer and a small vocabulary."""
    path = Path(__file__).resolve().parents[1] / "examples" / "deepseek-v3-671b" / "config.json"
    changes = {
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
        "num_nextn_predict_layers": 0,
        "vocab_size": 1024,
        "hidden_size": 7168 // scale,
        "moe_intermediate_size": 2048 // scale,
        "num_attention_heads": 128 // scale,
        "num_key_value_heads": 128 // scale,
        "q_lora_rank": 1536 // scale // BLOCK * BLOCK or BLOCK,
        "n_routed_experts": EXPERTS if scale == 1 else 32,
    }
    return {**json.loads(path.read_text()), **changes}


def write_layer(folder: Path, config: dict[str, Any]) -> ModelArch:
    """The checkpoint: FP8 blocks for linears, BF16 or F32 for the rest."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    arch = arch_of(config)
    specs = list(arch.tensors())
    writer = ShardWriter.open(folder, layout_shards(map(_stored, specs)))
    for number, spec in enumerate(specs):
        for name, tensor in _tensors(spec, number).items():
            writer.write(name, 0, tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    writer.finish()
    return arch


def _stored(spec: TensorSpec) -> tuple[TensorInfo, ...]:
    if not spec.linear:
        return (TensorInfo(spec.name, spec.shape, "F32" if spec.float32 else "BF16"),)
    blocks = (-(-spec.shape[0] // BLOCK), -(-spec.shape[1] // BLOCK))
    return (TensorInfo(spec.name, spec.shape, "F8_E4M3"), TensorInfo(f"{spec.name}_scale_inv", blocks, "F32"))


def _tensors(spec: TensorSpec, seed: int) -> dict[str, Tensor]:
    if len(spec.shape) == 1:
        made = torch.zeros(spec.shape, device=GPU) if spec.float32 else torch.ones(spec.shape, device=GPU)
        return {spec.name: made if spec.float32 else made.bfloat16()}
    # Outputs as large as inputs: 0.02 times the square root of 7168 is 1.7.
    weight = structured_weight(*spec.shape, seed) * (0.6 * (7168 / spec.shape[1]) ** 0.5)
    if not spec.linear:
        return {spec.name: weight.bfloat16()}
    rows, columns = spec.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)[:rows, :columns]
    return {spec.name: codes.to(torch.float8_e4m3fn).view(torch.uint8), f"{spec.name}_scale_inv": scale}


def balance(folder: Path, arch: ModelArch, x: RowStore) -> None:
    """Move the router's bias until experts get about equally many of some tokens (arXiv 2408.15664), in the file."""
    (block,) = (b for sublayer in arch.sublayers(0) for b in sublayer if isinstance(b, ExpertBlock))
    bias_name = next(spec.name for spec in arch.tensors() if spec.name.endswith("e_score_correction_bias"))
    with open_source(folder) as source:
        known = {name: source.read(name).to(GPU) for name in source.infos() if ".experts." not in name}
        rows = x.read(0, min(16, x.n_rows))
        step = 0.02
        for _ in range(200):
            indices = block.route(known.__getitem__, block.inputs(known.__getitem__, rows)).indices
            counts = indices.flatten().bincount(minlength=block.n_experts).float()
            known[bias_name] -= step * (counts - counts.mean()).sign()
            step *= 0.98
    writer = ShardWriter.open(folder, layout_shards(map(_stored, arch.tensors())))
    writer.write(bias_name, 0, known[bias_name].cpu().numpy().tobytes())
    writer.finish()


def hidden_states(arch: ModelArch, tokens: int) -> tuple[RowStore, RowStore]:
    """Before the layer: in the calibrated stream and, a little off, in the original one."""
    width, rank = arch.hidden_size, arch.hidden_size // 8
    stores = [MemoryRows(tokens // LENGTH, LENGTH, width, GPU) for _ in range(2)]
    generator = torch.Generator(GPU).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=GPU)

    directions = torch.linspace(0, -3, rank, device=GPU).exp()[:, None] * normal(rank, width) / rank**0.5
    channels = (0.5 * normal(width)).exp()
    channels[torch.randperm(width, generator=generator, device=GPU)[: max(1, width * 6 // 1000)]] *= 20
    for start, stop in row_batches(stores[0], GPU):
        count = (stop - start) * LENGTH
        rows = (normal(count, rank) @ directions + 0.15 * normal(count, width)) * channels
        rows *= (0.7 * normal(count, 1)).exp()
        stores[1].write(start, rows)
        stores[0].write(start, rows + 0.05 * rows.std(-1, keepdim=True) * normal(*rows.shape))
    return stores[0], stores[1]


# A run


@dataclass
class Stages:
    """Exclusive seconds of each stage, with a synchronisation on either side."""

    seconds: dict[str, float] = field(default_factory=dict)
    inner: list[float] = field(default_factory=list)

    def timed(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose seconds count to ``label``, less those of stages inside it."""

        def wrapped(*given: Any, **named: Any) -> Any:
            torch.cuda.synchronize()
            start = time.perf_counter()
            self.inner.append(0.0)
            result = function(*given, **named)
            torch.cuda.synchronize()
            whole = time.perf_counter() - start
            self.seconds[label] = self.seconds.get(label, 0.0) + whole - self.inner.pop()
            if self.inner:
                self.inner[-1] += whole
            return result

        return wrapped

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time the stages of `quantize_layer`."""
        places = [
            (dense, "_moments_of_stage", "dense: forward and moments"),
            (dense, "_add_output", "dense: output"),
            (dense, "quantize_group", "dense: quantise (rest)"),
            (layer, "route", "route, pooled moments"),
            (layer, "linears_of", "experts: read, decode FP8"),
            (experts, "_input_stats", "experts: moments of gate, up"),
            (experts, "_hidden", "experts: hidden, moments of down"),
            (outputs_module, "_quantized", "quantise (rest)"),
            (ldlq_factor, "factorize", "quantise: Cholesky"),
            (ldlq_factor, "towards_original", "quantise: targets of the cross term"),
            (IntScheme, "grid", "quantise: scales"),
            (ldlq_sweep, "sweep", "quantise: sweep"),
            (ldlq_polish, "polish", "quantise: polish (or loss)"),
            (ldlq_factor, "row_loss", "quantise: norms of the report"),
        ]
        with ExitStack() as stack:
            for place, name, label in places:
                stack.enter_context(patch.object(place, name, self.timed(label, getattr(place, name))))
            stack.enter_context(patch.object(layer, "_add_outputs", self.add_outputs(layer._add_outputs)))
            stack.enter_context(patch.object(ExchangedBatch, "add", self.add_of_all(ExchangedBatch.add)))
            for name, label in RANK_STAGES.items():
                stack.enter_context(patch.object(Ranks, name, self.exchanging(label, getattr(Ranks, name))))
            yield

    def exchanging(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` of `Ranks`, timed once all ranks are there; until then they wait."""
        waiting, timed = self.timed("ranks: waiting for others", dist.barrier), self.timed(label, function)

        def wrapped(ranks: Ranks, *given: Any, **named: Any) -> Any:
            if ranks.count > 1 and label != SUMS:  # sums go from rank to rank: not all are in it
                waiting(ranks.control)
            return timed(ranks, *given, **named)

        return wrapped

    def add_of_all(self, function: Callable[..., None]) -> Callable[..., None]:
        """``function``, timed by stream."""
        labels = ("experts: down, scatter", "experts: original stream")
        by_stream = [self.timed(label, function) for label in labels]
        return lambda batch, number, outputs: by_stream[number](batch, number, outputs)

    def add_outputs(self, function: Callable[[RowStore, ExpertOutputs], None]) -> Callable[..., None]:
        """``function`` timed by stream: hidden units are kept in the calibrated stream only."""
        calibrated, unquantised = (
            self.timed(label, function) for label in ("experts: down, scatter", "experts: original stream")
        )
        return lambda store, outputs: (calibrated if outputs.hidden else unquantised)(store, outputs)


@dataclass(frozen=True)
class Setting:
    arch: ModelArch
    source: ModelSource
    x: RowStore
    original: RowStore
    out: Path
    experts_at_once: int | None
    machine: Machine
    ahead: AheadSource
    deliveries: Deliveries
    ranks: Ranks
    rows: OwnRows


@dataclass(frozen=True)
class Writer:
    """Writes a layer's results on the thread that delivers, as a conversion does."""

    sink: FolderSink
    deliveries: Deliveries
    losses: list[float]

    def begin(self, block: str, total: int) -> None: ...

    def write(self, made: Quantised) -> None:
        self.deliveries.submit(partial(self._write, made))

    def write_importance(self, importance: Importance) -> None:
        raise AssertionError(f"{importance.name}: no output wants it")

    def _write(self, made: Quantised) -> None:
        for tensor in made.batch.tensors(made.names, made.n_tokens):
            self.sink.write(tensor)
            self.losses.append(tensor.error.relative_loss)


def planned_layer(source: ModelSource, arch: ModelArch, method: Gptq, tokens: int) -> Plan:
    """What `convert` would plan for this layer, whose memory it divides."""
    linears = {
        "match": "role:attention|shared_expert|expert",
        "scheme": SCHEME.model_dump(),
        "method": method.model_dump(),
    }
    rules = [linears, {"match": "*", "keep": "source"}]
    recipe = Recipe.from_dict(
        {
            "version": 1,
            "calibration": {"data": ["builtin:mixed"], "tokens": tokens, "sequence_length": LENGTH},
            "outputs": [{"name": "w4a16", "format": "compressed-tensors", "rules": rules}],
        }
    )
    return make_plan(recipe, arch, source.infos(), headers_of(source).stored)


def run_layer(setting: Setting, method: Gptq, stages: Stages | None) -> dict[str, Any]:
    """Quantise the layer once, from fresh copies of the hidden states."""
    arch, machine_, ahead, deliveries = setting.arch, setting.machine, setting.ahead, setting.deliveries
    ranks = setting.ranks
    linears = [spec for spec in arch.tensors() if spec.linear and spec.layer == 0]
    planned = [PlannedTensor(TensorInfo(spec.name, spec.shape, "BF16"), SCHEME, None) for spec in linears]
    streams = Streams(
        _copy(setting.x),
        _copy(setting.original) if method.follows_original else None,
        lambda width: MemoryRows(setting.x.n_rows, LENGTH, width, GPU, machine_.scratch_dtype),
        setting.rows,
    )
    if ranks.first:
        shutil.rmtree(setting.out, ignore_errors=True)
        setting.out.mkdir()
        FolderSink.open(COMPRESSED_TENSORS, setting.out, planned).close()
    ranks.barrier()
    sink = FolderSink.open(COMPRESSED_TENSORS, setting.out, planned)
    writer = Writer(sink, deliveries, [])
    plan = planned_layer(setting.source, arch, method, setting.rows.n_rows * LENGTH)
    share = share_of(conversion_needs(plan, arch), machine_.hardware)
    at_once = setting.experts_at_once or share.experts_at_once
    job = LayerJob(
        outputs=(OutputChoice({spec.name: (SCHEME, method) for spec in linears}),),
        weights=LayerWeights(
            ahead,
            arch.parts(),
            carries_quantised=True,
            cache_bytes=share.cache,
            device=GPU,
            narrow=machine_.scratch_dtype,
        ),
        streams=streams,
        experts_at_once=at_once,
        min_expert_tokens=256,
        ranks=ranks,
    )
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    ranks.barrier()
    start = time.perf_counter()
    with stages.watching() if stages is not None else ExitStack():
        found = quantize_layer(job, arch.sublayers(0), writer)
        torch.cuda.synchronize()
        computed = max(ranks.gathered(time.perf_counter() - start))
        deliveries.drain()
    seconds = max(ranks.gathered(time.perf_counter() - start))
    losses = [loss for own in ranks.gathered(writer.losses) for loss in own]
    counts = [count.n_tokens for of_block in found.experts.values() for count in of_block]
    result = {
        "seconds": round(seconds, 3),
        "of them waiting for the last bytes": round(seconds - computed, 3),
        "peak bytes of GPU memory": max(ranks.gathered(torch.cuda.max_memory_allocated())),
        "experts at once": at_once,
        "tokens of an expert: least, median, most": [min(counts), int(statistics.median(counts)), max(counts)],
        "mean relative loss": round(statistics.fmean(losses), 6),
        "bytes written": sum(path.stat().st_size for path in setting.out.iterdir()),
        "sha256 of the files": sha256_of_all(setting.out) if ranks.first else "",
        "sha256 of the hidden states after it": sha256_of_rows(streams, ranks),
    }
    sink.close()
    streams.close()
    return result


def sha256_of_all(folder: Path) -> str:
    """Of all files, by their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            while chunk := file.read(2**24):
                digest.update(chunk)
    return digest.hexdigest()


def sha256_of_rows(streams: Streams, ranks: Ranks) -> str:
    """Of the calibrated stream, slice by slice, all ranks' in their order."""
    spans = streams.rows.slices
    own = [hashlib.sha256(streams.x.read(*span).cpu().numpy().tobytes()).hexdigest() for span in spans]
    return hashlib.sha256("".join(one for part in ranks.gathered(own) for one in part).encode()).hexdigest()


def _copy(store: RowStore) -> RowStore:
    copy = MemoryRows(store.n_rows, store.length, store.width, GPU)
    for start, stop in row_batches(store, GPU):
        copy.write(start, store.read(start, stop))
    return copy


def profiled(setting: Setting, method: Gptq) -> None:
    """Print the kernels by their time, and how long the GPU was busy."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run_layer(setting, method, None)
    found = profile.key_averages()
    busy = sum(event.self_device_time_total for event in found) / 1e6
    print(f"kernels and copies: {busy:.3f} s", flush=True)
    print(found.table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=90), flush=True)


def measure(setting: Setting, cases: list[str], repeats: int, profile: bool) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name in cases:
        method = CASES[name]
        runs = [run_layer(setting, method, None) for _ in range(repeats + 1)][1:]  # the first compiles and pins
        stages = Stages()
        run_layer(setting, method, stages)
        ordered = sorted(stages.seconds.items(), key=lambda item: -item[1])
        results[name] = {
            **sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2],
            "all seconds": [run["seconds"] for run in runs],
            "stages, synchronised": {label: round(seconds, 3) for label, seconds in ordered},
        }
        if setting.ranks.first:
            print(name, json.dumps(results[name], indent=1), flush=True)
        if profile:
            profiled(setting, method)
    return results


def ceilings() -> dict[str, float]:
    """What this card does: matrix products in bfloat16, TF32, and a copy of 4 GiB."""
    a = torch.randn(8192, 8192, device=GPU)
    b = a.bfloat16()
    source, copy = (torch.empty(2**30, device=GPU) for _ in range(2))

    def seconds(function: Callable[[], object]) -> float:
        function()
        torch.cuda.synchronize()
        found: list[float] = []
        for _ in range(5):
            start = time.perf_counter()
            function()
            torch.cuda.synchronize()
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    tera = 2 * 8192**3 / 1e12
    torch.set_float32_matmul_precision("high")
    tf32 = tera / seconds(lambda: a @ a)
    torch.set_float32_matmul_precision("highest")
    return {
        "bf16 TFLOP/s": round(tera / seconds(lambda: b @ b), 1),
        "tf32 TFLOP/s": round(tf32, 1),
        "copy GB/s, read and write": round(2 * source.nbytes / 1e9 / seconds(lambda: copy.copy_(source)), 1),
    }


def sizes_of(config: dict[str, Any], method: Gptq, tokens: int) -> Sizes:
    return Sizes(
        tokens=tokens,
        slots=tokens * config["num_experts_per_tok"],
        experts=config["n_routed_experts"],
        hidden=config["hidden_size"],
        inter=config["moe_intermediate_size"],
        context=config["num_attention_heads"] * config["v_head_dim"],
        cross=method.follows_original,
        polish=method.polish,
    )


def whole_model(layer_seconds: float) -> dict[str, Any]:
    """All of V3 from one layer: what is computed, and what a disk adds."""
    compute = MOE_LAYERS * layer_seconds
    moved = 688 + 349  # GB read in FP8 blocks, written as int4 g128
    return {
        "compute, minutes": round(compute / 60, 2),
        **{
            f"with a disk of {rate} GB/s, minutes: overlapped / one after the other": [
                round(max(compute, moved / rate) / 60, 2),
                round((compute + moved / rate) / 60, 2),
            ]
            for rate in (7, 3)
        },
    }


def peers(setting: Setting, tokens: int) -> list[dict[str, Any]]:
    """gptqmodel's and llm-compressor's own functions on the first expert."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from peers.on_gpu import peers_on_gpu

    block = next(b for s in setting.arch.sublayers(0) for b in s if isinstance(b, ExpertBlock))
    gate, up, down = (setting.source.read(names[0]).to(GPU) for names in (block.gates, block.ups, block.downs))
    known = {n: setting.source.read(n).to(GPU) for n in setting.source.infos() if ".experts." not in n}
    n_rows = min(setting.x.n_rows, max(1, tokens // LENGTH))
    x = block.inputs(known.__getitem__, setting.x.read(0, n_rows).to(GPU)).bfloat16()[:tokens]
    hidden = block.activate(x @ gate.T, x @ up.T)
    found = peers_on_gpu(gate, up, down, x, hidden)
    return [{key: value for key, value in row.items() if key != "weights"} for row in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=524_288)
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--experts-at-once", type=int)
    parser.add_argument("--cases", nargs="*", choices=[*CASES], default=[*CASES])
    parser.add_argument("--profile", action="store_true", help="print what the GPU spends its time on, by kernel")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/moe-layer"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "moe_layer.json")
    arguments = parser.parse_args()
    torch.cuda.set_device(GPU)
    place = place_of(os.environ)
    with ExitStack() as stack:
        ranks = ALONE if place is None else stack.enter_context(connected(place, "cuda"))
        stack.enter_context(foreground(GPU))
        run(arguments, ranks)


def run(arguments: argparse.Namespace, ranks: Ranks) -> None:
    folder, tokens = arguments.folder, arguments.tokens
    result: dict[str, Any] = {
        "what": __doc__.splitlines()[0],
        **machine(),
        "GPUs": ranks.count,
        "tokens": tokens,
        "ceilings": ceilings(),
    }
    start = time.perf_counter()
    config = layer_config(arguments.scale)
    arch = write_layer(folder / "source", config) if ranks.first else arch_of(config)
    x, original = hidden_states(arch, tokens)  # all of them on each rank, as the generator gives them
    if ranks.first:
        balance(folder / "source", arch, x)
    ranks.barrier()
    print(f"prepared in {time.perf_counter() - start:.0f} s", flush=True)
    own = own_rows(x.n_rows, ranks.number, ranks.count)
    with open_source(folder / "source") as source:
        # The originals wait in the processor's memory: only a run's own streams take the GPU's.
        # As in a conversion, threads that read and write outlive a layer, and so does the GPU memory of their streams.
        ahead, deliveries = AheadSource(source, GPU), Deliveries(GPU)
        setting = Setting(
            arch,
            source,
            _away(x, own),
            _away(original, own),
            folder / "out",
            arguments.experts_at_once,
            Machine(GPU, default_budget() // ranks.on_host),
            ahead,
            deliveries,
            ranks,
            own,
        )
        del x, original
        result["layer"] = measure(setting, arguments.cases, arguments.repeats, arguments.profile)
        whole = result["all of V3, extrapolated"] = {
            "what": f"{MOE_LAYERS} MoE layers as measured at {tokens:,} tokens; 3 dense layers and embeddings (2 % of "
            "the weights) and validation are not in it; read 688 GB + write 349 GB at the stated rate of one disk for "
            "both"
        }
        for case, found in result["layer"].items():
            seconds = found["stages, synchronised"]
            sizes = sizes_of(layer_config(arguments.scale), CASES[case], tokens)
            found["rates of the stages"] = stage_rates(sizes, seconds, result["ceilings"])
            whole[case] = whole_model(found["seconds"])
        if ranks.first:
            write(result, arguments.out)
        if arguments.peers:
            result["peers, one expert"] = peers(setting, min(16_384, tokens))
            write(result, arguments.out)
        ahead.close()
        deliveries.close()
    ranks.barrier()
    if ranks.first:
        print(json.dumps(result["all of V3, extrapolated"], indent=1), flush=True)
        shutil.rmtree(folder)


def _away(store: RowStore, own: OwnRows) -> RowStore:
    """A copy of this rank's rows in page-locked memory of the processor."""
    copy = MemoryRows(own.count, store.length, store.width)
    for start, stop in row_batches(copy, GPU):
        copy.write(start, store.read(own.first + start, own.first + stop).cpu())
    store.close()
    data = copy.read(0, copy.n_rows)
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(data.data_ptr(), data.nbytes, 0))
    return copy


if __name__ == "__main__":
    main()
