"""The end of a conversion: config and side files, validation of what lies on the disk, quantkit.json, model card, final
name."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from pydantic import JsonValue

from quantkit.calibrate.dataset import FileProvenance, TokenRows, eval_windows
from quantkit.convert.conversion import Conversion
from quantkit.convert.events import (
    ExpertTokenStats,
    Finished,
    OutputReport,
    Report,
    StageStarted,
    ValidationProgress,
)  # fmt: skip
from quantkit.convert.folder import OutputFolder
from quantkit.documents.conversion import (
    CalibrationFile,
    ConversionDocument,
    LinearRecord,
    PoorFit,
    StoredRole,
    ValidationResult,
    ValidationScores,
)
from quantkit.documents.journal import ExpertRecord, JobHeader, LayerEntry, TensorRecord
from quantkit.documents.portable import without_folder, without_folders
from quantkit.documents.read import CONVERSION
from quantkit.errors import OutputError
from quantkit.evaluate.compare import compare_all
from quantkit.evaluate.scores import limits_exceeded
from quantkit.evaluate.validation import scored_model, summarise
from quantkit.formats.bundle import CardFacts, write_model_card
from quantkit.formats.model_source import source_name
from quantkit.formats.preallocated import UNFINISHED, disk_errors, sha256_of, write_durably
from quantkit.formats.safetensors.header import printable
from quantkit.formats.source_card import source_card
from quantkit.plan.decide import Action
from quantkit.plan.machine import peak_gpu_bytes, peak_rss_bytes
from quantkit.plan.plan import OutputPlan, Plan
from quantkit.plan.recipe import Recipe
from quantkit.plan.recipe_validation import Validation
from quantkit.plan.schedule import FILES, VALIDATION
from quantkit.plan.source_tensors import vision_notes
from quantkit.plan.text_notes import text_notes
from quantkit.schemes import ChosenScheme, Scheme
from quantkit.schemes.gaussian import fits_poorly, gaussian_losses
from quantkit.verify.run import Scope, verify_path
from quantkit.version import __version__


def result_folder(folder: OutputFolder, plan: Plan, output: OutputPlan) -> Path:
    """Where an output is written: the result itself, or a folder of it when there are several."""
    path = folder.result if len(plan.outputs) == 1 else folder.result / output.output.name
    with disk_errors(path):
        path.mkdir(exist_ok=True)
    return path


def finish(
    conversion: Conversion, header: JobHeader, rows: TokenRows | None, base_dir: Path, *, resumed: bool
) -> Report:
    """Complete, validate and publish every output."""
    reports: list[OutputReport] = []
    on_gaussian = gaussian_losses(conversion.machine.device)
    for number, (output, sink) in enumerate(zip(conversion.plan.outputs, conversion.sinks, strict=True)):
        directory = result_folder(conversion.folder, conversion.plan, output)
        records = conversion.journal.tensors_of(number)
        _require_all(conversion.folder, output, records)
        with conversion.timer.stage("files"):
            conversion.on_event(StageStarted(FILES))
            hashes = sink.finish(conversion.journal.steps_of(number))
            write_side_files(conversion, output, directory)
            hashes = {**hashes, **_hashes_of_others(directory, hashes)}
        with conversion.timer.stage("validation"):
            result = _validate(conversion, output, directory, base_dir)
        with conversion.timer.stage("files"):
            poor = poor_fits(output, records, on_gaussian)
            document = _document(conversion, output, header, rows, records, hashes, result)
            if conversion.whole is not None:
                document = document.model_copy(update={"pruning": conversion.whole.record})
            if poor:
                document = document.model_copy(update={"poor_fits": poor})
            tuning = {entry.layer: entry.tuning for entry in conversion.journal.layers if entry.tuning is not None}
            if tuning:
                document = document.model_copy(update={"tuning": tuning})
            write_durably(directory / CONVERSION, document.to_json().encode())
            write_model_card(directory, _card(conversion, output, directory, result))
        with conversion.timer.stage("files"):
            verified = verify_path(directory, Scope(hashes=False, text=False))
        made = _output_report(conversion, output, records, result)
        faults = tuple(finding.text for finding in verified.faults)
        reports.append(replace(made, faults=faults, poor_fits=poor))
    conversion.folder.publish()
    report = Report(
        outputs=tuple(reports),
        seconds=dict(conversion.timer.seconds),
        peak_rss_bytes=peak_rss_bytes(),
        tokens=0 if rows is None else rows.tokens.size,
        expert_tokens=expert_token_stats(_experts(conversion.journal.layers)),
        resumed=resumed,
        peak_gpu_bytes=peak_gpu_bytes(conversion.machine.device),
        validated=validated_as_a_whole(
            None if report.validation is None else report.validation.passed for report in reports
        ),
    )
    conversion.on_event(Finished(report))
    return report


def validated_as_a_whole(passed: Iterable[bool | None]) -> bool | None:
    """Whether all outputs keep their limits, None if there are none. ``passed``: the same for each output."""
    limited = [each for each in passed if each is not None]
    return all(limited) if limited else None


def poor_fits(
    output: OutputPlan, records: Mapping[str, TensorRecord], on_gaussian: Callable[[ChosenScheme], float]
) -> tuple[PoorFit, ...]:
    """Linears that lose far more than Gaussian weights do in their scheme (``on_gaussian``), largest loss first. What
    was calibrated is weighed by its inputs, else by nothing."""
    found: list[PoorFit] = []
    for name, record in records.items():
        quantising = output.decisions[name].quantising
        if quantising is None:
            continue
        scheme, _ = quantising
        expected = on_gaussian(scheme)
        if fits_poorly(record.relative_loss, expected):
            fit = PoorFit(
                name=name, scheme=scheme.label, relative_loss=record.relative_loss, gaussian_loss=round(expected, 6)
            )
            found.append(fit)
    return tuple(sorted(found, key=lambda fit: (-fit.relative_loss, fit.name)))


def _require_all(folder: OutputFolder, output: OutputPlan, records: Mapping[str, TensorRecord]) -> None:
    """Raise `OutputError` unless the journal has exactly what the output quantises."""
    quantised = {name for name, decision in output.decisions.items() if decision.action is Action.QUANTIZE}
    different = sorted(quantised ^ records.keys())
    if different:
        raise OutputError(
            f"{folder.journal}: does not fit this job: {printable(different[0])} is "
            f"{'missing' if different[0] in quantised else 'not to be quantised'}.",
            hint="Begin anew with --restart.",
        )


def _hashes_of_others(directory: Path, known: Mapping[str, str]) -> dict[str, str]:
    """sha256 (hex) of the config and tokenizer files: of all that the report, which holds them, does not come after."""
    others = {CONVERSION, "README.md", *known}
    with disk_errors(directory):
        names = [path.name for path in sorted(directory.iterdir()) if path.is_file()]
    # A file that a killed process left half written is replaced in a moment.
    return {name: sha256_of(directory / name) for name in names if name.removesuffix(UNFINISHED) not in others}


def write_side_files(conversion: Conversion, output: OutputPlan, directory: Path) -> None:
    """Config, tokenizer and the like."""
    dropped = any(decision.action is Action.DROP for decision in output.decisions.values())
    output.target.write_side_files(
        directory, conversion.source.directory, conversion.source.config, output.planned, mtp=not dropped
    )


def _validate(conversion: Conversion, output: OutputPlan, directory: Path, base_dir: Path) -> ValidationResult | None:
    """Score the files that were written, read back from the disk, against the source."""
    wanted = conversion.plan.recipe.validation
    if wanted is None:
        return None
    windows = eval_windows(
        wanted.text, wanted.context, conversion.source.directory, base_dir, wanted.max_windows_per_file
    )
    conversion.on_event(StageStarted(VALIDATION))
    device, cache_bytes = conversion.machine.device, conversion.share.cache // 2
    arch, source = conversion.arch, conversion.source
    if conversion.whole is not None:
        arch, source = conversion.whole.arch, conversion.whole.source
    with output.target.open_written(directory) as written:
        (found,) = compare_all(
            arch,
            scored_model(arch, source, device, cache_bytes, name=str(source.directory)),
            [scored_model(conversion.arch, written, device, cache_bytes, str(directory))],
            torch.from_numpy(windows.tokens).long(),
            conversion.stores.new,
            on_layer=lambda layer: conversion.on_event(ValidationProgress(layer + 1, conversion.arch.n_layers)),
        )
    return _result(output, wanted, summarise(found.tokens, found.drafts))


def _result(output: OutputPlan, wanted: Validation, scores: ValidationScores) -> ValidationResult:
    problems = limits_exceeded(
        scores, max_perplexity_increase=wanted.max_perplexity_increase, max_mean_kl=wanted.max_mean_kl
    )
    return ValidationResult(output=output.output.name, scores=scores, problems=problems, limits=wanted.has_limits)


def _document(
    conversion: Conversion,
    output: OutputPlan,
    header: JobHeader,
    rows: TokenRows | None,
    records: Mapping[str, TensorRecord],
    hashes: Mapping[str, str],
    result: ValidationResult | None,
) -> ConversionDocument:
    """quantkit.json."""
    return ConversionDocument(
        quantkit=__version__,
        job=header,
        recipe=recipe_values(conversion.plan.recipe),
        source=source_name(conversion.source),
        output=output.output.name,
        validated=None if result is None else result.passed,
        validation=result,
        tensor_bytes=output.nbytes,
        bpw=output.bpw,
        contents=tuple(
            StoredRole(
                role=size.role.value,
                stored_as=size.what,
                tensors=size.tensors,
                parameters=size.parameters,
                nbytes=size.nbytes,
            )
            for size in output.sizes
        ),
        calibration=() if rows is None else tuple(map(_calibration_file, rows.provenance)),
        expert_tokens={entry.layer: entry.experts for entry in conversion.journal.layers if entry.experts},
        tensors={
            tensor.name: _linear_record(tensor.scheme, records.get(tensor.name))
            for tensor in output.planned
            if tensor.scheme is not None
        },
        sha256=dict(hashes),
    )


def recipe_values(recipe: Recipe) -> dict[str, JsonValue]:
    """The recipe in plain values, without the folders of this machine."""
    return cast("dict[str, JsonValue]", without_folders(recipe.model_dump(mode="json", exclude_none=True)))


def _calibration_file(provenance: FileProvenance) -> CalibrationFile:
    return CalibrationFile(**asdict(replace(provenance, file=without_folder(provenance.file))))


def _linear_record(scheme: Scheme, record: TensorRecord | None) -> LinearRecord:
    """``record`` is None for a linear that the source has in this scheme already."""
    settings = scheme.model_dump(mode="json")
    if record is None:
        return LinearRecord(scheme=settings)
    known: dict[str, Any] = {"relative_loss": record.relative_loss, "n_tokens": record.n_tokens}
    if record.fallback:
        known["fallback"] = record.fallback
    if record.output_loss is not None:
        known["output_loss"] = record.output_loss
    return LinearRecord(scheme=settings, **known)


def _card(conversion: Conversion, output: OutputPlan, directory: Path, result: ValidationResult | None) -> CardFacts:
    source = source_card(conversion.source.directory, conversion.source.config)
    measured: dict[str, str] = {}
    if result is not None:
        scores = result.scores
        measured = {
            "perplexity, reference": scores.reference_perplexity.shown(4),
            "perplexity, this checkpoint": scores.candidate_perplexity.shown(4),
            "mean KL divergence": f"{scores.mean_kl.shown(5)} nats per token",
            "same most likely token": scores.top1.percent(),
            **({} if scores.draft is None else {"MTP draft agreement": scores.draft.shown()}),
            "measured on": f"{scores.tokens:,} tokens in {scores.windows:,} windows",
            "limits of the recipe": {True: "met", False: "exceeded", None: "no limits set"}[result.passed],
        }
    return CardFacts(
        title=f"{source_name(conversion.source)}-{output.output.name}",
        recipe=yaml.safe_dump(recipe_values(conversion.plan.recipe), sort_keys=False, allow_unicode=True),
        parameters=output.parameters,
        nbytes=output.nbytes,
        contents=tuple((s.role.value, s.what, s.parameters, s.nbytes) for s in output.sizes),
        measured=measured,
        notes=(
            *output.target.notes(output.planned),
            *vision_notes(conversion.arch, conversion.source.infos()),
            *text_notes(conversion.plan.recipe, conversion.arch),
            *_pruned_notes(conversion),
        ),
        format=output.target.label,
        serve=output.target.serve_commands(conversion.source.directory, output.planned),
        version=__version__,
        base_model=source.base_model,
        license=source.license,
        validated=result is None or result.passed is not False,
    )


def _pruned_notes(conversion: Conversion) -> tuple[str, ...]:
    left = conversion.arch.routed_experts()
    if conversion.whole is None or left is None:
        return ()
    record = conversion.whole.record
    return (
        f"Pruned: {left.count} of the {record.experts} routed experts of each layer are here, those with the highest "
        f"mean of gate weight times norm of the output (REAP) on the calibration text; {CONVERSION} lists them. What "
        "that text does not use is lost.",
    )


def _output_report(
    conversion: Conversion, output: OutputPlan, records: Mapping[str, TensorRecord], result: ValidationResult | None
) -> OutputReport:
    several = len(conversion.plan.outputs) > 1
    path = conversion.folder.out / output.output.name if several else conversion.folder.out
    return OutputReport(
        name=output.output.name,
        path=path,
        nbytes=output.nbytes,
        bpw=output.bpw,
        tensors=output.tensors,
        quantized=len(records),
        repacked=output.repacked,
        fallbacks=sum(bool(record.fallback) for record in records.values()),
        validation=result,
        serve=output.target.serve_commands(conversion.source.directory, output.planned, shlex.quote(str(path))),
    )


def _experts(layers: Sequence[LayerEntry]) -> list[ExpertRecord]:
    """Every routed expert of every layer; none in a data-free conversion."""
    return [expert for entry in layers for block in entry.experts.values() for expert in block]


def expert_token_stats(experts: Sequence[ExpertRecord]) -> ExpertTokenStats | None:
    """Tokens over these experts; None if there are none."""
    if not experts:
        return None
    counts = [expert.n_tokens for expert in experts]
    return ExpertTokenStats(
        experts=len(counts),
        least=min(counts),
        median=round(statistics.median(counts)),
        most=max(counts),
        unseen=counts.count(0),
        thin=sum(expert.borrowed > 0 for expert in experts),
    )
