"""Where everything comes from: source, versions, device, dates, commands, checksums."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from quantkit.documents.portable import without_folder
from quantkit.report import numbers
from quantkit.report.contents import Block, Code, Section, Table
from quantkit.report.scored import LabelledConversion, LabelledEvaluation


def evaluations(evaluated: Sequence[LabelledEvaluation]) -> Section:
    """What was measured on what, with what."""
    blocks = [block for one in evaluated for block in _evaluation(one)]
    return Section("measured", "How it was measured", tuple(blocks))


_DIGESTS = ("recipe", "source", "tokenizer", "calibration text", "imatrix", "sensitivity")
"""What a job states by its sha256."""


def same_job(converted: LabelledConversion, earlier: Sequence[LabelledConversion]) -> LabelledConversion | None:
    """The first of ``earlier`` that the same job wrote: another output of one pass."""
    document = converted.document
    facts = (document.source, document.recipe, document.job)
    return next((one for one in earlier if (one.document.source, one.document.recipe, one.document.job) == facts), None)


def conversion(
    converted: LabelledConversion, group: str, first: LabelledConversion | None = None, *, text: bool
) -> Section:
    """``first``: the conversion of the same job that all they share is listed with. ``text``: whether the calibration
    text is listed here, and not with another conversion that has the same."""
    document = converted.document
    rows = [
        ("output", document.output),
        ("date of quantkit.json", f"{converted.written:%Y-%m-%d %H:%M} UTC"),
        *(_job(converted) if first is None else [("all else", f"as {first.label}: written in the same pass")]),
    ]
    blocks: list[Block] = [Table(("", ""), tuple(rows), left=2, title=f"Conversion {converted.label}")]
    if first is None:
        blocks.append(Code("To repeat it, with the recipe above in recipe.yaml", conversion_command(converted), "bash"))
    if document.calibration and text:
        files = tuple(
            (without_folder(file.file), f"{file.documents:,}", f"{file.tokens:,}", f"{file.rows:,}", file.sha256)
            for file in document.calibration
        )
        head = ("calibration text", "documents", "tokens", "rows taken", "sha256")
        blocks.append(Table(head, files, title="", long=True))
    if document.sha256:
        sums = tuple((name, digest) for name, digest in sorted(document.sha256.items()))
        blocks.append(Table(("file", "sha256"), sums, left=2, long=True))
    return Section("provenance", "Provenance", tuple(blocks), group)


def _job(converted: LabelledConversion) -> list[tuple[str, str]]:
    """What the outputs of a job have in common. What was not used (no imatrix) has no row."""
    document = converted.document
    facts = document.job.facts()
    rows = [("source", document.source or "-"), ("quantkit", str(facts.pop("quantkit version", document.quantkit)))]
    for name, value in facts.items():
        if name == "memory budget" and isinstance(value, int):
            rows.append((name, numbers.binary_size(value)))
        elif value is not None:
            rows.append((f"{name}, sha256" if name in _DIGESTS else name, str(value)))
    return rows


def conversion_command(converted: LabelledConversion) -> str:
    """What makes the same bytes again, on the same kind of machine. Of several outputs each gets a folder in OUT."""
    job, document = converted.document.job, converted.document
    outputs = document.recipe.get("outputs")
    out = "OUT" if isinstance(outputs, list) and len(outputs) > 1 else converted.label
    words = ["quantkit", "convert", document.source or "SOURCE", "-r", "recipe.yaml", "-o", out]
    words += ["--device", "cpu" if job.device == "cpu" else "cuda"]
    for option, value in (("--jobs", job.threads), ("--memory-budget", job.memory_budget)):
        if value is not None:
            words += [option, str(value)]
    return shlex.join(words)


def _evaluation(evaluated: LabelledEvaluation) -> list[Block]:
    document = evaluated.document
    protocol, file = document.protocol, document.reference_file
    rows = [
        ("date", f"{evaluated.written:%Y-%m-%d %H:%M} UTC"),
        ("reference", f"{document.reference.name} ({document.reference.format})"),
        ("reference, sha256", document.reference.fingerprint),
        *(
            []
            if file is None
            else [("its statistics", f"{without_folder(file.path)}: {file.top:,} tokens of each position")]
        ),
        *((name, version) for name, version in document.versions.items()),
        ("device", document.device),
        ("arithmetic", document.arithmetic),
        ("protocol", f"{protocol.name}, windows of {protocol.context:,} tokens. {protocol.description}"),
        ("tokens, sha256", document.tokens_sha256),
    ]
    if document.noise_floor is not None:
        rows.append(("noise floor", document.noise_floor.rounding))
    models = tuple(
        (
            label,
            candidate.model.format,
            f"{candidate.model.nbytes:,}",
            candidate.model.fingerprint,
            " ".join(candidate.model.notes),
        )
        for label, candidate in zip(evaluated.labels, document.candidates, strict=True)
    )
    texts = tuple(
        (without_folder(text.file), f"{text.tokens:,}", f"{text.windows:,}", text.sha256) for text in document.text
    )
    return [
        Table(("", ""), tuple(rows), left=2, title=f"Evaluation {evaluated.path.name}"),
        Table(("candidate", "format", "bytes", "fingerprint", "notes"), models, left=2, long=True),
        Table(("evaluation text", "tokens", "windows", "sha256"), texts, long=True),
        Code("To repeat it", evaluation_command(evaluated), "bash"),
    ]


def evaluation_command(evaluated: LabelledEvaluation) -> str:
    """The command that repeats an evaluation, with the relative paths that were given, the names of absolute ones, and
    ``--text`` as the files are called, which is not always how they were given."""
    document, protocol = evaluated.document, evaluated.document.protocol
    candidates = [without_folder(candidate.model.path) for candidate in document.candidates]
    if document.reference_file is not None:  # it decides text and protocol
        words = ["quantkit", "evaluate", without_folder(document.reference_file.path), *candidates]
    else:
        words = ["quantkit", "evaluate", without_folder(document.reference.path), *candidates]
        for text in dict.fromkeys(without_folder(_given(text.file)) for text in document.text):
            words += ["--text", text]
        words += ["--context", str(protocol.context), "--protocol", protocol.name]
        if protocol.max_windows_per_file is not None:
            words += ["--max-windows-per-file", str(protocol.max_windows_per_file)]
        if document.noise_floor is None:
            words.append("--no-noise-floor")
    words += ["--device", "cpu" if document.device == "cpu" else "cuda", "-o", "evaluation.json"]
    return shlex.join(words)


def _given(file: str) -> str:
    """ "builtin:eval" of "builtin:eval/code.txt"."""
    return file.partition("/")[0] if file.startswith("builtin:") else file
