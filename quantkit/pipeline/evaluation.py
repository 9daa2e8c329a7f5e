"""`evaluate`: a reference and candidates of any format through one layer-by-layer stream -> `Evaluation`.

Weights of one layer of one model at a time; hidden states in memory while they fit half of the budget, else in a
temporary folder; logits in blocks of the vocabulary.
"""

from __future__ import annotations

import hashlib
import platform
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

import quantkit
from quantkit.arch.base import ModelArch
from quantkit.calibrate.dataset import Cut, TokenRows, eval_windows
from quantkit.calibrate.hidden_states import RowStore
from quantkit.calibrate.portions import BATCH_TOKENS
from quantkit.errors import CalibrationError, PlanError
from quantkit.evaluate.compare import Comparison, Model, compare_all
from quantkit.evaluate.document import Candidate, Evaluation, NoiseFloor, Protocol, Text
from quantkit.evaluate.statistics import result_of
from quantkit.evaluate.token_scores import POSITIONS, VOCAB_BLOCK
from quantkit.evaluate.validation import BF16_ROUNDING, model_of, rounded_to_bf16
from quantkit.pipeline.evaluated import Evaluated, names_by_layer, open_candidate, open_reference
from quantkit.pipeline.machine import Machine, Stores, Timer

ARITHMETIC = "float32; weights decoded as they are stored, activations not quantised"
_PROTOCOLS: dict[Cut, str] = {
    "windows": "BOS and the next context - 1 tokens of a file, without overlap; every token but BOS is scored.",
    "llama.cpp": "As llama-perplexity: the text with BOS in front in chunks of context tokens, BOS in place of each "
    "chunk's first; tokens from context / 2 + 1 on are scored.",
}
DECODING_COPIES = 4
"""Of the largest matrix in float32: as stored, decoded, converted, and kept."""
ACTIVATION_COPIES = 4
BYTES_PER_TOKEN = 96
"""Of a model: running sums of its logits, and experts chosen."""


@dataclass(frozen=True, slots=True)
class Started:
    """Everything is open. ``candidates`` without the noise floor."""

    candidates: int
    windows: int
    tokens: int
    layers: int


@dataclass(frozen=True, slots=True)
class LayerPassed:
    """Every model has passed ``layer`` (from 1) of ``layers``."""

    layer: int
    layers: int


OnEvaluation = Callable[[Started | LayerPassed], None]


def evaluate(
    reference: Path | str,
    candidates: Sequence[Path | str],
    *,
    text: Sequence[str] = ("builtin:eval",),
    context: int = 512,
    max_windows_per_file: int | None = None,
    protocol: Cut = "windows",
    noise_floor: bool = True,
    device: str = "auto",
    memory_budget: int | None = None,
    base_dir: Path = Path(),
    times: bool = False,
    on_event: OnEvaluation = lambda event: None,
) -> Evaluation:
    """Score candidates against a reference; options as of ``quantkit evaluate``. ``base_dir``: where relative names of
    text files count from.

    Raises a `QuantkitError` with one line for whatever a user, a file or the machine can cause.
    """
    machine = Machine.of(device, memory_budget)
    timer = Timer()
    first_scored = context // 2 if protocol == "llama.cpp" else 0
    if context - 1 - first_scored < 1:
        raise CalibrationError(f"evaluation: context {context} leaves nothing to score by protocol {protocol}.")
    with ExitStack() as stack:
        with timer.stage("open"):
            original = stack.enter_context(open_reference(Path(reference)))
            others = [stack.enter_context(open_candidate(Path(path), original)) for path in candidates]
            windows = eval_windows(text, context, Path(reference), base_dir, max_windows_per_file, protocol)
        on_event(Started(len(others), len(windows.tokens), windows.tokens.size, original.arch.n_layers))
        with timer.stage("stream"):
            found = _compare(machine, original, others, windows, first_scored, noise_floor, on_event)
        results = [result_of(comparison, windows.domains) for comparison in found]
        floor = NoiseFloor(rounding=BF16_ROUNDING, result=results.pop(0)) if noise_floor else None
        return Evaluation(
            versions={
                "quantkit": quantkit.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            device=_device_name(machine.device),
            arithmetic=ARITHMETIC,
            protocol=Protocol(
                name=protocol,
                description=_PROTOCOLS[protocol],
                context=context,
                max_windows_per_file=max_windows_per_file,
                scored_per_window=context - 1 - first_scored,
            ),
            text=_text(windows),
            tokens_sha256=hashlib.sha256(windows.tokens.tobytes()).hexdigest(),
            reference=original.facts,
            noise_floor=floor,
            candidates=tuple(
                Candidate(model=other.facts, result=result) for other, result in zip(others, results, strict=True)
            ),
            window_domains=tuple(windows.domains),
            seconds=dict(timer.seconds) if times else None,
        )


def _compare(
    machine: Machine,
    original: Evaluated,
    others: Sequence[Evaluated],
    windows: TokenRows,
    first_scored: int,
    noise_floor: bool,
    on_event: OnEvaluation,
) -> list[Comparison]:
    """The noise floor first, if it is wanted, then the candidates."""
    arch, tokens = original.arch, torch.from_numpy(windows.tokens).long()
    n_models = 1 + noise_floor + len(others)
    stores_bytes, cache_bytes = _share(machine, arch, n_models, tokens.shape)
    opened = (original, *others)
    reference, *rest = (model_of(one.arch, one.source, machine.device, cache_bytes) for one in opened)
    models: list[Model] = [rounded_to_bf16(arch, reference), *rest] if noise_floor else rest
    names = names_by_layer(arch)

    def read_ahead(layer: int) -> None:
        for one in opened:
            one.source.prefetch(names.get(layer, []))

    def on_layer(layer: int) -> None:
        read_ahead(layer + 2)
        on_event(LayerPassed(layer + 1, arch.n_layers))

    with tempfile.TemporaryDirectory(prefix="quantkit-") as folder:
        stores = Stores(Path(folder), stores_bytes)

        def new_rows(n_rows: int, length: int, width: int) -> RowStore:
            return stores.new(n_rows, length, width)

        read_ahead(0)
        read_ahead(1)
        return compare_all(arch, reference, models, tokens, new_rows, first_scored=first_scored, on_layer=on_layer)


def _share(machine: Machine, arch: ModelArch, n_models: int, shape: tuple[int, ...]) -> tuple[int, int]:
    """Bytes for hidden states in memory and for weights kept between batches, of what the budget leaves."""
    linears = [spec for spec in arch.tensors() if spec.linear]
    largest = max((spec.shape[0] * spec.shape[1] for spec in linears), default=0) * 4
    widest = max((max(spec.shape) for spec in linears), default=0)
    n_rows, length = shape
    working = (
        DECODING_COPIES * largest
        + ACTIVATION_COPIES * 4 * max(BATCH_TOKENS, length) * widest
        + n_models * VOCAB_BLOCK * arch.hidden_size * 4
        + 6 * POSITIONS * VOCAB_BLOCK * 4
        + n_models * n_rows * length * BYTES_PER_TOKEN
    )
    spare = machine.budget - working
    if spare < 0:
        budget, least = (f"{nbytes / 2**30:.2f} GiB" for nbytes in (machine.budget, working))
        raise PlanError(
            f"memory budget {budget}: this evaluation needs at least {least}.",
            hint="Raise --memory-budget, or evaluate fewer candidates or windows at a time.",
        )
    return spare // 2, spare // 3


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _text(windows: TokenRows) -> tuple[Text, ...]:
    return tuple(
        Text(file=p.file, sha256=p.sha256, documents=p.documents, tokens=p.tokens, windows=p.rows)
        for p in windows.provenance
    )
