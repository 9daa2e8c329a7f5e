"""Inspections as text for people and as documents for --json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantkit.inspect.folder import Inspection
from quantkit.inspect.gguf import GgufInspection
from quantkit.inspect.imatrix import ImatrixBeside, ImatrixInspection
from quantkit.inspect.path import AnyInspection
from quantkit.inspect.sensitivity import SensitivityInspection
from quantkit.inspect.storage import StorageSummary
from quantkit.inspect.trial import TrialInspection
from quantkit.text.sensitivity import pass_document, pass_text
from quantkit.text.tables import both_units, table
from quantkit.text.trial import trial_text


def inspection_text(found: AnyInspection) -> str:
    """A headline, tables, and one line for each unusual thing, and each that is only to be known; a trial as `convert`
    shows it."""
    if isinstance(found, TrialInspection):
        return trial_text(found.document, found.path)
    if isinstance(found, SensitivityInspection):
        return pass_text(found)
    if isinstance(found, Inspection):
        blocks = _folder_blocks(found)
    elif isinstance(found, GgufInspection):
        blocks = _gguf_blocks(found)
    else:
        blocks = _imatrix_blocks(found)
    notes = [f"note: {line}" for line in found.notes] if isinstance(found, Inspection) else []
    unusual = [f"unusual: {line}" for line in found.unusual] or ["nothing unusual"]
    return "\n\n".join([*blocks, "\n".join([*unusual, *notes])])


def inspection_document(found: AnyInspection) -> Mapping[str, object]:
    """An inspection for --json. Sizes in bytes; ``format`` says which document it is; of a trial, its report."""
    if isinstance(found, TrialInspection):
        return found.document.model_dump(mode="json")
    if isinstance(found, SensitivityInspection):
        return pass_document(found)
    if isinstance(found, Inspection):
        return _folder_document(found)
    return _gguf_document(found) if isinstance(found, GgufInspection) else _imatrix_document(found)


# ------------------------------------------------------------------------------------------------------------- folders


def _folder_blocks(found: Inspection) -> list[str]:
    head = f"{found.directory}: {found.family or 'unknown architecture'}, {found.quantization or 'not quantised'}"
    size = f"{both_units(found.nbytes)}, {found.bpw:.3f} bpw"
    tensors = f"{found.stored_tensors:,} tensors in {found.shards:,} shard{'s' * (found.shards != 1)}, {size}"
    return [f"{head}\n{tensors}", _table(found, "weights")]


def _table(found: Inspection | GgufInspection, counted: str) -> str:
    rows = [
        (h.role, h.what, f"{h.weights:,}", f"{h.parameters:,}", f"{h.nbytes:,}", f"{h.bpw:.3f}") for h in found.holdings
    ]
    weights = sum(one.weights for one in found.holdings)
    rows.append(("total", "", f"{weights:,}", f"{found.parameters:,}", f"{found.nbytes:,}", f"{found.bpw:.3f}"))
    return table(("role", "stored as", counted, "parameters", "bytes", "bpw"), rows, left=2, rule_before_last=True)


def _folder_document(found: Inspection) -> Mapping[str, object]:
    return {
        "path": str(found.directory),
        "format": "safetensors",
        "family": found.family,
        "quantization": found.quantization,
        "shards": found.shards,
        "stored_tensors": found.stored_tensors,
        "parameters": found.parameters,
        "nbytes": found.nbytes,
        "bpw": round(found.bpw, 5),
        "holdings": _storage_documents(found.holdings),
        "unusual": list(found.unusual),
        "notes": list(found.notes),
    }


def _storage_documents(summaries: Sequence[StorageSummary]) -> list[Mapping[str, object]]:
    return [
        {
            "role": one.role,
            "stored_as": one.what,
            "weights": one.weights,
            "parameters": one.parameters,
            "nbytes": one.nbytes,
            "bpw": round(one.bpw, 5),
        }
        for one in summaries
    ]


# ---------------------------------------------------------------------------------------------------------------- GGUF


def _gguf_blocks(found: GgufInspection) -> list[str]:
    named = [found.architecture or "unknown architecture", found.file_type or "type not stated"]
    lines = [f"{found.path}: {', '.join(named)}" + (f', "{found.name}"' if found.name else "")]
    files = "1 file" if found.files == 1 else f"{found.files:,} files"
    lines.append(
        f"{found.stored_tensors:,} tensors in {files}, {both_units(found.nbytes)}, {found.bpw:.3f} bpw; "
        f"{found.file_bytes - found.nbytes:,} bytes of headers and padding"
    )
    lines += [line for line in (_model_line(found.settings), _tokenizer_line(found)) if line]
    if found.imatrix is not None:
        beside = found.imatrix
        covered = f"{beside.fitting:,} of its {beside.weights:,} weights are in the model"
        lines.append(f"beside it {beside.path.name}: {_made_of(beside)}; {covered}")
    return ["\n".join(lines), _table(found, "tensors")]


def _model_line(settings: Mapping[str, object]) -> str:
    """The sizes that people compare models by."""

    def part(label: str, key: str, **details: str) -> str:
        """ "experts 256 (8 used, 1 shared)": details are words by keys, "_" for the dots of a key."""
        if key not in settings:
            return ""
        known = {word: settings.get(f"{key.partition('_')[0]}_{detail}") for detail, word in details.items()}
        inner = ", ".join(f"{_number(value)} {word}" for word, value in known.items() if value is not None)
        return f"{label} {_number(settings[key])}" + (f" ({inner})" if inner else "")

    dense, mtp = settings.get("leading_dense_block_count"), settings.get("nextn_predict_layers")
    kinds = [f"{_number(n)} {word}" for n, word in ((dense, "dense"), (mtp, "MTP")) if n]
    experts = {
        "used_count": "used",
        "shared_count": "shared",
        "group_count": "groups",
        "group_used_count": "of them used",
    }
    parts = [
        part("layers", "block_count") + (f" ({', '.join(kinds)})" if kinds else ""),
        part("experts", "expert_count", **experts),
        part("context", "context_length"),
        part("width", "embedding_length"),
        part("heads", "attention.head_count"),
        part("vocabulary", "vocab_size"),
    ]
    return ", ".join(text for text in parts if text)


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _tokenizer_line(found: GgufInspection) -> str:
    vocabulary = found.vocabulary
    if vocabulary is None:
        return ""
    pre = f" (pre {vocabulary.pre})" if vocabulary.pre else ""
    template = "with" if vocabulary.chat_template else "without"
    return f"tokenizer {vocabulary.model}{pre}, {vocabulary.tokens:,} tokens, {template} chat template"


def _made_of(found: ImatrixBeside | ImatrixInspection) -> str:
    texts = ", ".join(found.datasets) or "texts not named"
    return texts + ("" if found.chunks is None else f", {found.chunks:,} chunks")


def _gguf_document(found: GgufInspection) -> Mapping[str, object]:
    vocabulary, beside = found.vocabulary, found.imatrix
    return {
        "path": str(found.path),
        "format": "gguf",
        "architecture": found.architecture,
        "name": found.name,
        "file_type": found.file_type,
        "files": found.files,
        "file_bytes": found.file_bytes,
        "settings": dict(found.settings),
        "tokenizer": None
        if vocabulary is None
        else {
            "model": vocabulary.model,
            "pre": vocabulary.pre,
            "tokens": vocabulary.tokens,
            "chat_template": vocabulary.chat_template,
        },
        "stored_tensors": found.stored_tensors,
        "parameters": found.parameters,
        "nbytes": found.nbytes,
        "bpw": round(found.bpw, 5),
        "holdings": _storage_documents(found.holdings),
        "imatrix": None if beside is None else {**_imatrix_heading(beside), "weights_in_model": beside.fitting},
        "unusual": list(found.unusual),
    }


# ------------------------------------------------------------------------------------------------------------- imatrix


def _imatrix_blocks(found: ImatrixInspection) -> list[str]:
    rows = [("weights", f"{found.weights:,}"), ("values", f"{found.values:,}")]
    if found.tokens is not None:
        least, most = found.tokens
        rows.append(("tokens", f"{most:,}" if least == most else f"{least:,} to {most:,}"))
    experts = found.experts
    if experts is not None:
        rows += [
            ("experts", f"{experts.experts:,}"),
            ("tokens per expert", f"{experts.least:,} to {experts.most:,}, median {experts.median:,}"),
            ("experts without tokens", f"{len(experts.unseen):,}"),
        ]
    return [f"{found.path}: imatrix, {_made_of(found)}", table(("importance of inputs", ""), rows)]


def _imatrix_heading(found: ImatrixBeside | ImatrixInspection) -> dict[str, object]:
    return {
        "path": str(found.path),
        "format": "imatrix",
        "datasets": list(found.datasets),
        "chunks": found.chunks,
        "weights": found.weights,
    }


def _imatrix_document(found: ImatrixInspection) -> Mapping[str, object]:
    experts = found.experts
    return {
        **_imatrix_heading(found),
        "values": found.values,
        "tokens": None if found.tokens is None else {"least": found.tokens[0], "most": found.tokens[1]},
        "experts": None
        if experts is None
        else {
            "experts": experts.experts,
            "least": experts.least,
            "median": experts.median,
            "most": experts.most,
            "unseen": list(experts.unseen),
        },
        "unusual": list(found.unusual),
    }
