"""`evaluate`: a reference and candidates of any format through one layer-by-layer stream -> `Evaluation`.

Weights of one layer of one model at a time; hidden states in memory while they fit half of the budget, else in a
temporary folder; logits in blocks of the vocabulary. What was learnt of the reference can be kept in a file, which then
stands for it.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantkit.arch import arch_of
from quantkit.arch.base import ModelArch
from quantkit.calibrate.dataset import Cut, TokenRows, eval_windows
from quantkit.calibrate.documents import find_files, read_documents
from quantkit.documents.evaluation import Candidate, Evaluation, NoiseFloor, Protocol, ReferenceFile, Result, Text
from quantkit.errors import CalibrationError, ConfigError, PlanError, SourceError
from quantkit.evaluate.events import EvaluationStarted, LayerPassed, OnEvaluation, ignore
from quantkit.evaluate.open import Evaluated, open_candidate, open_reference, tokenizer_sha256
from quantkit.evaluate.reference_file import (
    TOP,
    Record,
    ReferenceStatistics,
    ReferenceWriter,
    check_place,
    is_reference_file,
)
from quantkit.evaluate.reference_scores import Recorder
from quantkit.evaluate.statistics import result_of
from quantkit.evaluate.stream import EvaluationRun, device_name
from quantkit.evaluate.validation import BF16_ROUNDING
from quantkit.formats.source import read_config
from quantkit.plan.machine import Machine, Timer
from quantkit.version import __version__

ARITHMETIC = "float32; weights decoded as they are stored, activations not quantised"
DEFAULT_TEXT = ("builtin:eval",)
DEFAULT_CONTEXT = 512
_PROTOCOLS: dict[Cut, str] = {
    "windows": "BOS and the next context - 1 tokens of a file, without overlap; every token but BOS is scored.",
    "llama.cpp": "As llama-perplexity: the text with BOS in front in chunks of context tokens, BOS in place of each "
    "chunk's first; tokens from context / 2 + 1 on are scored.",
}
LOWER_BOUND = (
    "A lower bound: exact on the reference's {top} most likely tokens, all others as one. Perplexities, ratios, first "
    "choices and changes of probability are exact."
)
_NO_HIDDEN = "The reference's hidden states are not kept in its file (for DeepSeek V3 1.7 MB for each token)."
_NO_FLOOR = "The file was written without it."


def evaluate(
    reference: Path | str,
    candidates: Sequence[Path | str] = (),
    *,
    text: Sequence[str] | None = None,
    context: int | None = None,
    max_windows_per_file: int | None = None,
    protocol: Cut | None = None,
    noise_floor: bool = True,
    save_reference: Path | str | None = None,
    device: str = "auto",
    memory_budget: int | None = None,
    base_dir: Path = Path(),
    times: bool = False,
    on_event: OnEvaluation = ignore,
) -> Evaluation:
    """Score candidates against a reference; options as of ``quantkit evaluate``. ``base_dir``: where relative names of
    text files count from.

    ``save_reference``: where to keep the reference's statistics. Such a file may be the ``reference`` of later calls:
    text, context and protocol are then the file's.

    Raises a `QuantkitError` with one line for whatever a user, a file or the machine can cause.
    """
    paths, origin = tuple(Path(path) for path in candidates), Path(reference)
    if not paths and save_reference is None:
        raise PlanError("evaluate: no candidate was given.", hint="Give candidates, or a file to save_reference.")
    job = _Job(Machine.of(device, memory_budget), Timer(), paths, noise_floor, base_dir, on_event)
    if is_reference_file(origin):
        if save_reference is not None:
            raise PlanError(f"{origin}: is a reference's file already.", hint="Leave --save-reference out.")
        found = job.against_file(origin, _Asked(text, context, max_windows_per_file, protocol))
    else:
        chosen = _protocol(protocol or "windows", DEFAULT_CONTEXT if context is None else context, max_windows_per_file)
        save = None if save_reference is None else Path(save_reference)
        found = job.against_folder(origin, text or DEFAULT_TEXT, chosen, save)
    return found.model_copy(update={"seconds": dict(job.timer.seconds)}) if times else found


def _protocol(name: Cut, context: int, max_windows_per_file: int | None) -> Protocol:
    if name not in _PROTOCOLS:
        raise PlanError(f"evaluation: protocol is {name!r}, {' or '.join(_PROTOCOLS)} was needed.")
    first_scored = context // 2 if name == "llama.cpp" else 0
    if context - 1 - first_scored < 1:
        raise CalibrationError(f"evaluation: context {context} leaves nothing to score by protocol {name}.")
    return Protocol(
        name=name,
        description=_PROTOCOLS[name],
        context=context,
        max_windows_per_file=max_windows_per_file,
        scored_per_window=context - 1 - first_scored,
    )


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a caller wants of text and protocol; None: nothing in particular."""

    text: Sequence[str] | None
    context: int | None
    max_windows_per_file: int | None
    protocol: Cut | None


@dataclass(frozen=True, slots=True)
class _Job:
    """Everything but the reference."""

    machine: Machine
    timer: Timer
    candidates: tuple[Path, ...]
    noise_floor: bool
    base_dir: Path
    on_event: OnEvaluation

    def against_folder(self, reference: Path, text: Sequence[str], protocol: Protocol, save: Path | None) -> Evaluation:
        """The reference goes through the layers beside the candidates, and into the file ``save``."""
        if save is not None:
            check_place(save)
        with ExitStack() as stack:
            with self.timer.stage("open"):
                original = stack.enter_context(open_reference(reference))
                tokenizer = tokenizer_sha256(reference)
                others = self._open(stack, original.arch, tokenizer)
                cut = (protocol.max_windows_per_file, protocol.name)
                windows = eval_windows(text, protocol.context, reference, self.base_dir, *cut)
            record = _record(self.machine, original, protocol, windows, tokenizer)
            tokens = torch.from_numpy(windows.tokens).long()
            writer = None
            if save is not None:
                writer = stack.enter_context(ReferenceWriter(save, record, tokens, original.arch.n_layers))
            walk = self._start(original.arch, tokens, 0 if save is None else record.top)
            with self.timer.stage("stream"):
                found = walk.compare(
                    original,
                    others,
                    tokens,
                    protocol.context - 1 - protocol.scored_per_window,
                    noise_floor=self.noise_floor,
                    recorder=None if writer is None else Recorder(writer),
                )
            results = [result_of(comparison, windows.domains) for comparison in found]
            floor = NoiseFloor(rounding=BF16_ROUNDING, result=results.pop(0)) if self.noise_floor else None
            if writer is not None:
                writer.finish(floor)
            return self._document(record, floor, others, results)

    def against_file(self, path: Path, asked: _Asked) -> Evaluation:
        """The reference is what an earlier run kept of it."""
        with ExitStack() as stack:
            with self.timer.stage("open"):
                reference = stack.enter_context(ReferenceStatistics(path))
                record = reference.record
                _require_asked(path, record, asked, self.base_dir)
                try:
                    arch = arch_of(record.config)
                except ConfigError as error:
                    raise ConfigError(f"{path}: {error.message}", hint=error.hint) from None
                if arch.vocab_size != record.vocab_size:
                    raise SourceError(f"{path}: its record names two sizes of the vocabulary.")
                others = self._open(stack, arch, record.tokenizer_sha256)
            walk = self._start(arch, reference.tokens, record.top)
            with self.timer.stage("stream"):
                found = walk.compare_recorded(reference, others)
            results = [result_of(comparison, record.window_domains) for comparison in found]
            floor = record.noise_floor if self.noise_floor else None
            return self._document(record, floor, others, results, self._file_facts(path, reference))

    def _open(self, stack: ExitStack, arch: ModelArch, tokenizer: str | None) -> list[Evaluated]:
        return [stack.enter_context(open_candidate(path, arch, tokenizer)) for path in self.candidates]

    def _start(self, arch: ModelArch, tokens: Tensor, top: int) -> EvaluationRun:
        self.on_event(EvaluationStarted(len(self.candidates), len(tokens), tokens.numel(), arch.n_layers))
        return EvaluationRun(self.machine, arch, lambda layer: self.on_event(LayerPassed(layer, arch.n_layers)), top)

    def _file_facts(self, path: Path, reference: ReferenceStatistics) -> ReferenceFile:
        record = reference.record
        missing = {"hidden_error": _NO_HIDDEN, "expert_errors": _NO_HIDDEN}
        if self.noise_floor and record.noise_floor is None:
            missing["noise_floor"] = _NO_FLOOR
        return ReferenceFile(
            path=str(path),
            versions=record.versions,
            device=record.device,
            top=record.top,
            mean_rest=reference.mean_rest(),
            kld=LOWER_BOUND.format(top=record.top),
            not_available=missing,
        )

    def _document(
        self,
        record: Record,
        floor: NoiseFloor | None,
        others: Sequence[Evaluated],
        results: Sequence[Result],
        reference_file: ReferenceFile | None = None,
    ) -> Evaluation:
        return Evaluation(
            versions=_versions(),
            device=device_name(self.machine.device),
            arithmetic=ARITHMETIC,
            protocol=record.protocol,
            text=record.text,
            tokens_sha256=record.tokens_sha256,
            reference=record.reference,
            noise_floor=floor,
            candidates=tuple(
                Candidate(model=other.facts, result=result) for other, result in zip(others, results, strict=True)
            ),
            window_domains=record.window_domains,
            reference_file=reference_file,
        )


def _versions() -> dict[str, str]:
    return {"quantkit": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _require_asked(path: Path, record: Record, asked: _Asked, base_dir: Path) -> None:
    """Raise `SourceError` if the file holds another text or protocol than was asked for."""
    protocol = record.protocol
    for what, found, wanted in (
        ("--protocol", protocol.name, asked.protocol),
        ("--context", protocol.context, asked.context),
        ("--max-windows-per-file", protocol.max_windows_per_file, asked.max_windows_per_file),
    ):
        if wanted is not None and found != wanted:
            kept = "without" if found is None else f"with {what} {found}, not"
            raise SourceError(
                f"{path}: was made {kept} {what} {wanted}.",
                hint="Leave the option out, or save the reference again with it.",
            )
    if asked.text is None:
        return
    hashes = [read_documents(file)[0] for file in find_files(asked.text, base_dir)]
    if hashes != [text.sha256 for text in record.text]:
        raise SourceError(
            f"{path}: was made of other text: {', '.join(text.file for text in record.text)}.",
            hint="Leave --text out, or save the reference again with it.",
        )


def _record(
    machine: Machine, original: Evaluated, protocol: Protocol, windows: TokenRows, tokenizer: str | None
) -> Record:
    return Record(
        versions=_versions(),
        device=device_name(machine.device),
        arithmetic=ARITHMETIC,
        reference=original.facts,
        config=dict(read_config(Path(original.facts.path))),
        tokenizer_sha256=tokenizer,
        protocol=protocol,
        text=tuple(
            Text(file=p.file, sha256=p.sha256, documents=p.documents, tokens=p.tokens, windows=p.rows)
            for p in windows.provenance
        ),
        window_domains=windows.domains,
        tokens_sha256=hashlib.sha256(windows.tokens.tobytes()).hexdigest(),
        top=min(TOP, original.arch.vocab_size),
        vocab_size=original.arch.vocab_size,
    )
