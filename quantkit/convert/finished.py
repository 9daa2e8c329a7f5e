"""A job that is finished already: an earlier process was stopped between the last rename and its end."""

from __future__ import annotations

import shlex

from quantkit.convert.events import Finished, OnEvent, OutputReport, Report
from quantkit.convert.finish import expert_token_stats, recipe_values, validated_as_a_whole
from quantkit.convert.folder import OutputFolder, exists_already
from quantkit.convert.prepare import Job
from quantkit.convert.replaceable import results_of
from quantkit.documents.conversion import ConversionDocument
from quantkit.documents.journal import JobHeader
from quantkit.plan.decide import Action
from quantkit.plan.machine import peak_rss_bytes
from quantkit.plan.plan import OutputPlan


def report_finished(job: Job, folder: OutputFolder, header: JobHeader, on_event: OnEvent) -> Report:
    """Remove what is left of OUT.partial, and report what quantkit.json says. Raises `OutputError` if OUT is another
    job's: then it only exists already."""
    outputs = job.plan.outputs
    names = [output.output.name for output in outputs]
    documents = results_of(job.out, names)
    if not documents or not all(_is_of(document, job, header) for document in documents):
        raise exists_already(job.out, names)
    folder.discard()
    experts = [
        expert for blocks in documents[0].expert_tokens.values() for block in blocks.values() for expert in block
    ]
    report = Report(
        outputs=tuple(_output(job, *pair) for pair in zip(outputs, documents, strict=True)),
        seconds={},
        peak_rss_bytes=peak_rss_bytes(),
        tokens=0 if job.rows is None else job.rows.tokens.size,
        expert_tokens=expert_token_stats(experts),
        resumed=True,
        validated=validated_as_a_whole(document.validated for document in documents),
        finished_before=True,
    )
    on_event(Finished(report))
    return report


def _is_of(document: ConversionDocument, job: Job, header: JobHeader) -> bool:
    """Whether this job wrote the result, and validated it as its recipe says."""
    return document.job.bytes_follow_from() == header.bytes_follow_from() and document.recipe == recipe_values(
        job.plan.recipe
    )


def _output(job: Job, output: OutputPlan, document: ConversionDocument) -> OutputReport:
    path = job.out if len(job.plan.outputs) == 1 else job.out / output.output.name
    return OutputReport(
        name=output.output.name,
        path=path,
        nbytes=document.tensor_bytes,
        bpw=document.bpw,
        tensors=output.tensors,
        quantized=sum(decision.action is Action.QUANTIZE for decision in output.decisions.values()),
        repacked=output.repacked,
        fallbacks=sum(bool(linear.fallback) for linear in document.tensors.values()),
        validation=document.validation,
        poor_fits=document.poor_fits,
        serve=output.target.serve_commands(job.source.directory, output.planned, shlex.quote(str(path))),
    )
