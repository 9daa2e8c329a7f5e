"""The report of a finished conversion as a table for people and as a document for --json."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.convert.events import OutputReport, Report
from quantkit.documents.conversion import ValidationResult
from quantkit.formats.sizes import short_size
from quantkit.text.tables import both_units, duration, table

NAMED = 5
"""Linears that a warning names."""
ADVICE = (
    "  Their weights are too small or too uneven for it. A rule can keep them (keep: bf16, or f32), or give them "
    "another scheme, such as scale_dtype: bfloat16."
)


def report_text(report: Report) -> str:
    """Tables of quality and size, times."""
    outputs = list(map(_output_text, report.outputs))
    warnings = [poor_fits_text(output) for output in report.outputs if output.poor_fits]
    if report.finished_before:
        said = "finished already: what an earlier run left of its work folder is removed."
        return "\n\n".join([said, *outputs, *warnings])
    return "\n\n".join([*outputs, _run_text(report), *warnings])


def _output_text(output: OutputReport) -> str:
    rows: list[tuple[str, str]] = []
    if output.validation is not None:
        rows += _validation_rows(output.validation)
    rows += [
        ("bits per weight", f"{output.bpw:.3f}"),
        ("size", both_units(output.nbytes)),
        ("quantised tensors", f"{output.quantized:,} of {output.tensors:,}"),
    ]
    if output.repacked:
        rows.append(("codes taken over from the source", f"{output.repacked:,} of {output.tensors:,}"))
    rows.append(("headers and config, for runtimes", "FAULTY" if output.faults else "sound"))
    if output.fallbacks:
        rows.append(("linears that fell back to a weaker method", f"{output.fallbacks:,} (see quantkit.json)"))
    return table((output.name, str(output.path)), rows)


def poor_fits_text(output: OutputReport) -> str:
    """A warning that names linears which lose far more than their scheme should."""
    fits = output.poor_fits
    lines = [
        f"  {fit.name}: loss {fit.relative_loss:.3g}, {fit.scheme} on Gaussian weights {fit.gaussian_loss:.2g}"
        for fit in fits[:NAMED]
    ]
    if len(fits) > NAMED:
        lines.append(f"  and {len(fits) - NAMED:,} others (see poor_fits in quantkit.json)")
    counted = "1 linear loses" if len(fits) == 1 else f"{len(fits):,} linears lose"
    return "\n".join(
        [f"warning: output {output.name}: {counted} over five times what the scheme should:", *lines, ADVICE]
    )


def _validation_rows(result: ValidationResult) -> list[tuple[str, str]]:
    scores = result.scores
    return [
        ("perplexity, reference", scores.reference_perplexity.shown(4)),
        ("perplexity, quantised", scores.candidate_perplexity.shown(4)),
        ("perplexity ratio, paired", scores.perplexity_ratio.shown(5)),
        ("mean KL divergence", f"{scores.mean_kl.shown(5)} nats"),
        ("KL divergence, median / 99th percentile", f"{scores.median_kl:.5f} / {scores.p99_kl:.5f} nats"),
        ("same most likely token", scores.top1.percent()),
        *([] if scores.draft is None else [("MTP draft agreement", scores.draft.shown())]),
        ("measured on", f"{scores.tokens:,} tokens in {scores.windows:,} windows"),
        ("limits of the recipe", {True: "met", False: "EXCEEDED", None: "no limits set"}[result.passed]),
    ]


def _run_text(report: Report) -> str:
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.seconds.items())
    rows = [
        ("peak memory", short_size(report.peak_rss_bytes)),
        ("time", f"{duration(report.total_seconds)} ({stages})"),
        ("calibration tokens", f"{report.tokens:,}" if report.tokens else "none (data-free)"),
    ]
    tokens = report.expert_tokens
    if tokens is not None:
        rows.append(
            (
                "tokens per expert",
                f"{tokens.least:,} to {tokens.most:,}, median {tokens.median:,}; of {tokens.experts:,} experts "
                f"{tokens.thin:,} got fewer than min_expert_tokens, {tokens.unseen:,} got none",
            )
        )
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def report_document(report: Report) -> Mapping[str, object]:
    """The report for --json. Times in seconds, sizes in bytes, divergences in nats."""
    tokens = report.expert_tokens
    return {
        "outputs": [_output_document(output) for output in report.outputs],
        "validated": report.validated,
        "resumed": report.resumed,
        "tokens": report.tokens,
        "seconds": {**report.seconds, "total": report.total_seconds},
        "peak_rss_bytes": report.peak_rss_bytes,
        "peak_gpu_bytes": report.peak_gpu_bytes,
        "expert_tokens": None
        if tokens is None
        else {
            "experts": tokens.experts,
            "least": tokens.least,
            "median": tokens.median,
            "most": tokens.most,
            "unseen": tokens.unseen,
            "thin": tokens.thin,
        },
    }


def _output_document(output: OutputReport) -> Mapping[str, object]:
    return {
        "name": output.name,
        "path": str(output.path),
        "nbytes": output.nbytes,
        "bpw": round(output.bpw, 5),
        "tensors": output.tensors,
        "quantized": output.quantized,
        "repacked": output.repacked,
        "fallbacks": output.fallbacks,
        "serve": list(output.serve),
        "poor_fits": [fit.model_dump(mode="json") for fit in output.poor_fits],
        "validation": None if output.validation is None else _validation_document(output.validation),
    }


def _validation_document(result: ValidationResult) -> Mapping[str, object]:
    return {**result.scores.model_dump(), "passed": result.passed, "problems": list(result.problems)}
