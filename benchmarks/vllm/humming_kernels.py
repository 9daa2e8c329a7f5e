"""Do vLLM's Humming kernels multiply what quantkit packed? Dense and experts, 2 to 8 bits, scales of either sign.

    PYTHONPATH=. python benchmarks/vllm/humming_kernels.py --save benchmarks/results/humming.json
    PYTHONPATH=. python benchmarks/vllm/humming_kernels.py --no-kernel     # without a GPU: all but the kernels

In: random weights, rounded by quantkit's search for scales and packed as a compressed-tensors folder holds them. The
kernels of humming-kernels (vLLM 0.33 installs 0.1.19) get these bytes as vLLM hands them over, once for one matrix and
twice for experts: by an index of tokens, and by tokens sorted by expert, the two ways in which vLLM multiplies them.

Out, for each case: the relative difference |y - x W'| / |x W'| from the float64 product with W', the weights as
quantkit decodes the same bytes. ``noise`` is the same for a product of bf16 matrices by torch: rounding.
``signs_dropped`` and ``unquantised`` are what a misreading would give: W' with all scales positive, and the weights
before rounding. A case is right where its difference is below three times the noise. ``ms`` and ``ms_bf16``: a product
by the kernel and by torch.

All kernels are compiled first, several at a time (NVRTC or nvcc, and CUDA's headers); then each runs alone.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantkit.formats.layouts.compressed_tensors import COMPRESSED_TENSORS
from quantkit.quantizers.rtn import Rtn
from quantkit.schemes import IntScheme, QuantizedTensor

WIDTHS = (2, 3, 4, 5, 6, 8)
DENSE, INDEXED, GROUPED = "dense", "indexed", "grouped_contiguous"
NOISE_FACTOR, REPEATS = 3.0, 50
REFUSALS = (AssertionError, RuntimeError, ValueError)
"""What Humming raises for what it does not take, and for a compiler that fails."""
WHAT = (
    "Products by humming-kernels of what quantkit packed, against the float64 product of the weights as quantkit "
    "decodes them; noise: a bf16 product by torch against the same. Random normal weights, inputs of 16 bits."
)


@dataclass(frozen=True, slots=True)
class Case:
    """One product. ``shape``: out, in; ``experts``: 0 for one matrix, else ``top_k`` of them take each token."""

    scheme: IntScheme
    form: str
    shape: tuple[int, int]
    tokens: int
    experts: int = 0
    top_k: int = 1

    @property
    def name(self) -> str:
        """ "int3 g128 dense"."""
        return f"{self.scheme.label} {self.form}"

    @property
    def compute(self) -> dict[str, str]:
        """Humming's compute_config."""
        return {"gemm_type": self.form}


@dataclass(frozen=True, slots=True)
class Weights:
    """``packed``: as the folder holds them, experts stacked in front; the others (experts or 1, out, in) float32:
    ``decoded``, ``positive`` with the signs of scales dropped, ``original``. ``negative``: the share of such scales."""

    packed: dict[str, Tensor]
    decoded: Tensor
    positive: Tensor
    original: Tensor
    negative: float


def cases(shape: tuple[int, int], tokens: int, experts: int, top_k: int) -> Iterator[Case]:
    """Every width in groups of 128, in all forms; smaller groups and zero points for some."""
    schemes = [IntScheme(bits=bits, group_size=128) for bits in WIDTHS]
    schemes += [IntScheme(bits=bits, group_size=group) for bits, group in ((2, 64), (3, 64), (3, 32), (4, 32))]
    schemes += [IntScheme(bits=bits, group_size=128, symmetric=False) for bits in (3, 4)]
    for scheme in schemes:
        yield Case(scheme, DENSE, shape, tokens)
        yield Case(scheme, INDEXED, shape, tokens, experts, top_k)
        yield Case(scheme, GROUPED, shape, tokens, experts, top_k)


@functools.lru_cache(maxsize=1)
def make_weights(scheme: IntScheme, shape: tuple[int, int], experts: int, device: str) -> Weights:
    """Round to nearest with the searched scale, whose sign is free."""
    generator = torch.Generator().manual_seed(0)
    original = (torch.randn(max(experts, 1), *shape, generator=generator) * 0.02).to(device)
    batch = Rtn().quantizer(None)(original, scheme)
    names = tuple(f"w{i}" for i in range(len(original)))
    parts = [packed_parts(tensor) for tensor in batch.tensors(names, (0,) * len(names))]
    packed = {key: torch.stack([part[key] for part in parts]).cpu() for key in parts[0]}
    scale = batch.stored["scale"]
    return Weights(
        packed if experts else {key: value[0] for key, value in packed.items()},
        batch.decode(),
        scheme.decode(**{**batch.stored, "scale": scale.abs()}),
        original,
        float((scale < 0).float().mean()),
    )


def packed_parts(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """ "weight_packed", "weight_scale" and so on: what follows the linear's name in a folder."""
    return {f"weight{key.removeprefix(tensor.name)}": value for key, value in COMPRESSED_TENSORS.pack(tensor).items()}


# --- which expert multiplies which token ------------------------------------------------------------------------------


def routes(case: Case, seed: int = 1) -> Tensor:
    """(tokens, top_k) int32 experts, no expert twice for a token; (tokens, 1) zeros for one matrix."""
    if not case.experts:
        return torch.zeros(case.tokens, 1, dtype=torch.int32)
    scores = torch.rand(case.tokens, case.experts, generator=torch.Generator().manual_seed(seed))
    return scores.topk(case.top_k, dim=1).indices.int()


def oracle(inputs: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """inputs (tokens, in), weights (experts, out, in), chosen (tokens, top_k) -> float64 (tokens * top_k, out)."""
    rows = inputs.double().repeat_interleave(chosen.shape[1], 0)
    result = rows.new_empty(len(rows), weights.shape[1])
    for expert in chosen.unique().tolist():
        own = chosen.flatten() == expert
        result[own] = rows[own] @ weights[expert].double().T
    return result


def index_of(chosen: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """int32: rows of the flattened ``chosen`` sorted by expert, each expert's padded to whole blocks of ``block`` rows
    with the number that no row has; the expert of each block; and the padded length."""
    flat = chosen.flatten()
    rows = [(flat == expert).nonzero().flatten() for expert in range(experts)]
    padded = [pad(own, (0, -len(own) % block), value=len(flat)) for own in rows]
    owners = [torch.full((len(own) // block,), expert) for expert, own in enumerate(padded)]
    order = torch.cat(padded).int()
    return order, torch.cat(owners).int().to(flat.device), torch.tensor(len(order), dtype=torch.int32)


def grouped(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The order that sorts the flattened ``chosen`` by expert, and int64 (experts + 1,) where each expert's rows
    begin."""
    counts = chosen.flatten().long().bincount(minlength=experts)
    return chosen.flatten().argsort(stable=True), pad(counts.cumsum(0), (1, 0))


# --- the kernels ------------------------------------------------------------------------------------------------------


def humming_layer(case: Case, packed: dict[str, Tensor]) -> Any:
    """Humming's layer with these bytes, rearranged for its kernels, on the current GPU."""
    from humming.layer import HummingLayer  # pyright: ignore[reportMissingImports]

    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "type": "int",
        "num_bits": case.scheme.bits,
        "strategy": "group",
        "group_size": case.scheme.group_size,
        "symmetric": case.scheme.symmetric,
    }
    rows, columns = case.shape
    layer = HummingLayer(
        shape_n=rows,
        shape_k=columns,
        weight_config=config,
        torch_dtype=torch.bfloat16,
        num_experts=case.experts or None,
    )
    wanted = {name: value.shape for name, value in layer.state_dict().items() if name in packed}
    found = {name: value.shape for name, value in packed.items()}
    if wanted != found:
        raise ValueError(f"{case.name}: quantkit packs {found}, Humming takes {wanted}")
    layer.load_from_tensors(packed)
    layer = layer.cuda()
    layer.transform()
    return layer


@dataclass(slots=True)
class Prepared:
    """A case on its way: ``layer`` None where Humming refused it, or where there is no kernel; ``wanted`` float64."""

    case: Case
    inputs: Tensor
    chosen: Tensor
    wanted: Tensor
    row: dict[str, Any]
    layer: Any = None
    tuning: dict[str, Any] = field(default_factory=dict[str, Any])


def attach_kernel(prepared: Prepared, packed: dict[str, Tensor]) -> None:
    """Load the bytes into Humming's layer, and take the tile sizes that it would take for so many rows."""
    from humming.tune import get_heuristics_config  # pyright: ignore[reportMissingImports]

    case = prepared.case
    try:
        layer = humming_layer(case, packed)
        prepared.tuning = get_heuristics_config(
            layer.humming_config, shape_m=prepared.chosen.numel(), gemm_type=case.form
        )
        prepared.layer = layer
    except REFUSALS as error:
        prepared.row.update(refused(error))


def compile_kernel(prepared: Prepared) -> None:
    """As the first call would. Humming keeps it under these texts."""
    from humming.kernel.humming import HummingKernel  # pyright: ignore[reportMissingImports]

    texts = json.dumps(prepared.case.compute), json.dumps(prepared.tuning)
    try:
        HummingKernel.prepare_kernels(prepared.layer.humming_config.to_str(), *texts)
    except REFUSALS as error:
        prepared.layer = None
        prepared.row.update(refused(error))


def refused(error: Exception) -> dict[str, Any]:
    """A kernel that refuses a case must not hide the others."""
    return {"right": False, "error": f"{type(error).__name__}: {error}"[:400]}


def product(prepared: Prepared) -> Callable[[], Tensor]:
    """A call that gives (tokens * top_k, out) bf16 in the order of the flattened experts."""
    case, layer, inputs, chosen = prepared.case, prepared.layer, prepared.inputs, prepared.chosen
    configs = {"compute_config": case.compute, "tuning_config": prepared.tuning}
    if case.form == DENSE:
        return lambda: layer(inputs, **configs)
    if case.form == INDEXED:
        order, owners, length = index_of(chosen, case.experts, int(prepared.tuning["block_shape"][0]))
        index = {"sorted_ids": order, "expert_ids": owners, "num_tokens_padded": length.to(order.device)}
        return lambda: layer(inputs, top_k=case.top_k, **index, **configs)
    order, starts = grouped(chosen, case.experts)
    rows, back = inputs.repeat_interleave(case.top_k, 0)[order], order.argsort()
    return lambda: layer(rows, expert_layout=starts, **configs)[back]


def run_kernel(prepared: Prepared) -> None:
    """Add the difference, and milliseconds beside torch's bf16 product where there is one matrix."""
    case, row = prepared.case, prepared.row
    call = product(prepared)
    try:
        row["difference"] = difference(call(), prepared.wanted)
    except REFUSALS as error:
        row.update(refused(error))
        return
    row["right"] = row["difference"] < NOISE_FACTOR * row["noise"]
    row["ms"] = round(milliseconds(call), 4)
    if case.form == DENSE:
        plain = torch.randn(case.shape, device="cuda").bfloat16()
        row["ms_bf16"] = round(milliseconds(lambda: prepared.inputs @ plain.T), 4)


def milliseconds(call: Callable[[], Tensor]) -> float:
    """Mean of `REPEATS` calls, after two."""
    call()
    call()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(REPEATS):
        call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / REPEATS


# --- the comparison ---------------------------------------------------------------------------------------------------


def difference(found: Tensor, wanted: Tensor) -> float:
    """Relative, in float64."""
    return float((found.double() - wanted).norm() / wanted.norm())


def prepare(case: Case, *, kernel: bool) -> Prepared:
    """Weights, inputs, the right product, and what a misreading would give; ``kernel``: on a GPU, with its layer."""
    device = "cuda" if kernel else "cpu"
    weights = make_weights(case.scheme, case.shape, case.experts, device)
    inputs = torch.randn(case.tokens, case.shape[1], generator=torch.Generator().manual_seed(2)).bfloat16().to(device)
    chosen = routes(case).to(device)
    wanted = oracle(inputs, weights.decoded, chosen)
    row: dict[str, Any] = {
        "case": case.name,
        "form": case.form,
        "scheme": case.scheme.model_dump(exclude={"kind"}),
        "shape": case.shape,
        "tokens": case.tokens,
        "experts": case.experts,
        "top_k": case.top_k,
        "negative_scales": round(weights.negative, 4),
        "noise": difference(bf16_product(inputs, weights.decoded, chosen), wanted),
        "unquantised": difference(oracle(inputs, weights.original, chosen), wanted),
    }
    if case.scheme.symmetric:
        row["signs_dropped"] = difference(oracle(inputs, weights.positive, chosen), wanted)
    prepared = Prepared(case, inputs, chosen, wanted, row)
    if kernel:
        attach_kernel(prepared, weights.packed)
    return prepared


def run_all(chosen: Sequence[Case], *, kernel: bool, jobs: int) -> Iterator[dict[str, Any]]:
    """The row of each case."""
    prepared = [prepare(case, kernel=kernel) for case in chosen]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(compile_kernel, [found for found in prepared if found.layer is not None]))
    for found in prepared:
        if found.layer is not None:
            run_kernel(found)
        yield found.row


def bf16_product(inputs: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """torch's, of the weights rounded to bf16."""
    rows, rounded = inputs.repeat_interleave(chosen.shape[1], 0), weights.bfloat16()
    result = rows.new_empty(len(rows), weights.shape[1])
    for expert in chosen.unique().tolist():
        own = chosen.flatten() == expert
        result[own] = rows[own] @ rounded[expert].T
    return result


def line(row: dict[str, Any]) -> str:
    told = [f"{key} {row[key]:.5f}" for key in ("difference", "noise", "signs_dropped", "unquantised") if key in row]
    told += [f"{key} {row[key]}" for key in ("negative_scales", "ms", "ms_bf16", "error") if key in row]
    verdict = {True: "right", False: "WRONG", None: "no kernel"}[row.get("right")]
    return f"{row['case']:40} {verdict:9} {', '.join(told)}"


def document(rows: list[dict[str, Any]], *, kernel: bool) -> dict[str, Any]:
    packages = ("torch", "triton", "humming-kernels") if kernel else ("torch",)
    return {
        "what": WHAT,
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if kernel else "no GPU",
        "versions": {name: version_of(name) for name in packages},
        "rows": rows,
    }


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not recorded"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(2048, 7168), metavar=("OUT", "IN"))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--only", default="", help="cases whose name has this in it, such as 'int3' or 'indexed'")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="kernels compiled at once")
    parser.add_argument("--no-kernel", action="store_true")
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("HUMMING_DISABLE_PARALLEL_BUILD", "1")  # or importing it builds in the background
    kernel = not given.no_kernel
    every = cases((given.shape[0], given.shape[1]), given.tokens, given.experts, given.top_k)
    chosen = [case for case in every if given.only in case.name]
    rows: list[dict[str, Any]] = []
    for row in run_all(chosen, kernel=kernel, jobs=given.jobs):
        rows.append(row)
        print(line(row), flush=True)
        if given.save:
            given.save.write_text(json.dumps(document(rows, kernel=kernel), indent=1) + "\n")
    sys.exit(any(row.get("right") is False for row in rows))


if __name__ == "__main__":
    main()
