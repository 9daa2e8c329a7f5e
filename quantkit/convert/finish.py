"""The end of a conversion: config and side files, validation of what lies on the disk, quantkit.json, model card, final
name."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
import yaml

from quantkit.calibrate.dataset import TokenRows, eval_windows
from quantkit.convert.events import (
    ExpertTokens,
    Finished,
    OutputReport,
    Report,
    StageStarted,
    ValidationProgress,
    ValidationResult,
)  # fmt: skip
from quantkit.convert.folder import REPORT_NAME, OutputFolder
from quantkit.convert.journal import Journal
from quantkit.convert.walk import Walk
from quantkit.documents.json_text import finite
from quantkit.evaluate.compare import compare
from quantkit.evaluate.scores import Scores, limits_exceeded
from quantkit.evaluate.validation import model_of, summarise
from quantkit.formats.bundle import CardFacts, write_model_card
from quantkit.formats.preallocated import UNFINISHED, sha256_of
from quantkit.formats.safetensors.writer import write_durably
from quantkit.plan.decide import Action
from quantkit.plan.machine import peak_gpu_bytes, peak_rss_bytes
from quantkit.plan.plan import OutputPlan, Plan
from quantkit.plan.recipe import Validation
from quantkit.version import __version__


def result_folder(folder: OutputFolder, plan: Plan, output: OutputPlan) -> Path:
    """Where an output is written: the result itself, or a folder of it when there are several."""
    path = folder.result if len(plan.outputs) == 1 else folder.result / output.output.name
    path.mkdir(exist_ok=True)
    return path


def finish(
    walk: Walk, header: Mapping[str, object], rows: TokenRows | None, base_dir: Path, *, resumed: bool
) -> Report:
    """Complete, validate and publish every output."""
    reports: list[OutputReport] = []
    for number, (output, sink) in enumerate(zip(walk.plan.outputs, walk.sinks, strict=True)):
        directory = result_folder(walk.folder, walk.plan, output)
        records = _tensor_records(walk.journal, number)
        quantised = {name for name, decision in output.decisions.items() if decision.action is Action.QUANTIZE}
        assert records.keys() == quantised, f"never written: {sorted(quantised - records.keys())[:3]}"
        with walk.timer.stage("files"):
            walk.on_event(StageStarted("files"))
            hashes = sink.finish()
            _write_side_files(walk, output, directory)
            hashes = {**hashes, **_hashes_of_others(directory, hashes)}
        with walk.timer.stage("validation"):
            result = _validate(walk, output, directory, base_dir)
        with walk.timer.stage("files"):
            document = _document(walk, output, header, rows, records, hashes, result)
            text = json.dumps(finite(document), indent=1, allow_nan=False) + "\n"
            write_durably(directory / REPORT_NAME, text.encode())
            write_model_card(directory, _card(walk, output, directory, result))
        reports.append(_output_report(walk, output, records, result))
    walk.folder.publish()
    report = Report(
        outputs=tuple(reports),
        seconds=dict(walk.timer.seconds),
        peak_rss_bytes=peak_rss_bytes(),
        tokens=0 if rows is None else rows.tokens.size,
        expert_tokens=_expert_tokens(walk.journal),
        resumed=resumed,
        peak_gpu_bytes=peak_gpu_bytes(walk.machine.device),
        validated=all(r.validation is None or r.validation.passed for r in reports),
    )
    walk.on_event(Finished(report))
    return report


def _hashes_of_others(directory: Path, known: Mapping[str, str]) -> dict[str, str]:
    """sha256 (hex) of the config and tokenizer files: of all that the report, which holds them, does not come after."""
    others = {REPORT_NAME, "README.md", *known}
    names = [path.name for path in sorted(directory.iterdir()) if path.is_file()]
    # A file that a killed process left half written is replaced in a moment.
    return {name: sha256_of(directory / name) for name in names if name.removesuffix(UNFINISHED) not in others}


def _write_side_files(walk: Walk, output: OutputPlan, directory: Path) -> None:
    dropped = any(decision.action is Action.DROP for decision in output.decisions.values())
    output.target.write_side_files(
        directory, walk.source.directory, walk.source.config, output.planned, mtp=not dropped
    )


def _validate(walk: Walk, output: OutputPlan, directory: Path, base_dir: Path) -> ValidationResult | None:
    """Score the files that were written, read back from the disk, against the source."""
    wanted = walk.plan.recipe.validation
    if wanted is None:
        return None
    windows = eval_windows(wanted.text, wanted.context, walk.source.directory, base_dir, wanted.max_windows_per_file)
    walk.on_event(StageStarted("validation", total=walk.arch.n_layers))
    device, cache_bytes = walk.machine.device, walk.share.cache // 2
    with output.target.open_written(directory) as written:
        scores = compare(
            walk.arch,
            model_of(walk.arch, walk.source, device, cache_bytes),
            model_of(walk.arch, written, device, cache_bytes),
            torch.from_numpy(windows.tokens).long(),
            walk.stores.new,
            on_layer=lambda layer: walk.on_event(ValidationProgress(layer + 1, walk.arch.n_layers)),
        )
    return _result(output, wanted, summarise(scores))


def _result(output: OutputPlan, wanted: Validation, scores: Scores) -> ValidationResult:
    problems = limits_exceeded(
        scores, max_perplexity_increase=wanted.max_perplexity_increase, max_mean_kl=wanted.max_mean_kl
    )
    return ValidationResult(output.output.name, scores, problems)


def _tensor_records(journal: Journal, output: int) -> dict[str, dict[str, object]]:
    """Error, tokens and fallback of every linear that an output quantised, in the order of the work."""
    records: dict[str, dict[str, object]] = {}
    for entry in (*journal.of_kind("outside"), *journal.of_kind("layer")):
        for number, name, loss, n_tokens, fallback in cast("list[tuple[int, str, float, int, str]]", entry["tensors"]):
            if number == output:
                records[name] = {"relative_loss": loss, "n_tokens": n_tokens}
                if fallback:
                    records[name]["fallback"] = fallback
    return records


def _document(
    walk: Walk,
    output: OutputPlan,
    header: Mapping[str, object],
    rows: TokenRows | None,
    records: Mapping[str, Mapping[str, object]],
    hashes: Mapping[str, str],
    result: ValidationResult | None,
) -> dict[str, object]:
    """quantkit.json. No times and no memory: the same job gives the same bytes."""
    schemes = {tensor.name: tensor.scheme.model_dump() for tensor in output.planned if tensor.scheme is not None}
    return {
        "quantkit": __version__,
        "job": dict(header),
        "recipe": walk.plan.recipe.model_dump(mode="json", exclude_none=True),
        "source": walk.source.directory.resolve().name,
        "output": output.output.name,
        "validated": None if result is None else result.passed,
        "validation": None if result is None else asdict(result),
        "tensor_bytes": output.nbytes,
        "bpw": output.bpw,
        "contents": [
            {
                "role": size.role.value,
                "stored_as": size.what,
                "tensors": size.tensors,
                "parameters": size.parameters,
                "nbytes": size.nbytes,
            }
            for size in output.sizes
        ],
        "calibration": [] if rows is None else [asdict(entry) for entry in rows.provenance],
        "expert_tokens": {
            str(entry["layer"]): entry["experts"] for entry in walk.journal.of_kind("layer") if entry["experts"]
        },
        "tensors": {name: {"scheme": scheme, **records.get(name, {})} for name, scheme in schemes.items()},
        "sha256": dict(hashes),
    }


def _card(walk: Walk, output: OutputPlan, directory: Path, result: ValidationResult | None) -> CardFacts:
    recipe = walk.plan.recipe.model_dump(mode="json", exclude_none=True)
    measured: dict[str, str] = {}
    if result is not None:
        scores = result.scores
        measured = {
            "perplexity, reference": scores.reference_perplexity.shown(4),
            "perplexity, this checkpoint": scores.candidate_perplexity.shown(4),
            "mean KL divergence": f"{scores.mean_kl.shown(5)} nats per token",
            "same most likely token": scores.top1.percent(),
            "measured on": f"{scores.tokens:,} tokens in {scores.windows:,} windows",
        }
    return CardFacts(
        title=f"{walk.source.directory.resolve().name}-{output.output.name}",
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
        parameters=output.parameters,
        nbytes=output.nbytes,
        contents=tuple((s.role.value, s.what, s.parameters, s.nbytes) for s in output.sizes),
        measured=measured,
        notes=tuple(output.target.notes(output.planned)),
        format=output.target.label,
        serve=output.target.serve_commands(walk.source.directory, output.planned),
        version=__version__,
        validated=result is None or result.passed,
    )


def _output_report(
    walk: Walk, output: OutputPlan, records: Mapping[str, Mapping[str, object]], result: ValidationResult | None
) -> OutputReport:
    several = len(walk.plan.outputs) > 1
    path = walk.folder.out / output.output.name if several else walk.folder.out
    return OutputReport(
        name=output.output.name,
        path=path,
        nbytes=output.nbytes,
        bpw=output.bpw,
        tensors=output.tensors,
        quantized=len(records),
        fallbacks=sum("fallback" in record for record in records.values()),
        validation=result,
        serve=output.target.serve_commands(walk.source.directory, output.planned, shlex.quote(str(path))),
    )


def _expert_tokens(journal: Journal) -> ExpertTokens | None:
    """Tokens of every routed expert of every layer; None for a data-free conversion."""
    counts: list[int] = []
    thin = 0
    for entry in journal.of_kind("layer"):
        for experts in cast("dict[str, list[tuple[int, float, int]]]", entry["experts"]).values():
            counts += [n_tokens for n_tokens, _, _ in experts]
            thin += sum(borrowed > 0 for _, _, borrowed in experts)
    if not counts:
        return None
    return ExpertTokens(len(counts), min(counts), round(statistics.median(counts)), max(counts), counts.count(0), thin)
