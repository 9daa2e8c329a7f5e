"""Reads an evaluation, its baseline and the losses that conversions reported, and says whether they can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from quantkit.documents.baseline import Baseline, ConversionLosses
from quantkit.documents.conversion import ConversionDocument
from quantkit.documents.evaluation import SCHEMA_VERSIONS, Candidate, Evaluation, Windows
from quantkit.documents.read import CONVERSION, IS_CONVERSION, document_bytes, first_problem, kind_of
from quantkit.errors import EvaluationError, QuantkitError
from quantkit.formats.safetensors.header import printable

MIN_WINDOWS = 8
"""Fewer say so little of the noise that their limits would let almost anything pass."""
_Model = TypeVar("_Model", bound=BaseModel)


def read_evaluation(path: Path) -> Evaluation:
    """A file of ``quantkit evaluate --out``. Raises `EvaluationError` with one line."""
    if not path.exists():
        raise EvaluationError(f"{path}: no such file.", hint="Make it: quantkit evaluate REFERENCE OUT -o FILE.")
    found = _read(path, Evaluation, "an evaluation", "quantkit evaluate REFERENCE OUT -o FILE makes one.")
    _check_version(path, found, "an evaluation")
    check_windows(path, found)
    return found


def read_baseline(path: Path) -> Baseline:
    """A file of ``quantkit check --update-baseline``. Raises `EvaluationError` with one line."""
    if not path.exists():
        raise EvaluationError(
            f"{path}: there is no such baseline.", hint="Make it from an evaluation you trust with --update-baseline."
        )
    found = _read(
        path, Baseline, "a baseline", "Make one of an evaluation you trust: --baseline NEW --update-baseline."
    )
    _check_version(path, found.evaluation, "a baseline")
    check_windows(path, found.evaluation)
    return found


def read_losses(evaluation: Evaluation, base: Path) -> dict[str, ConversionLosses]:
    """What conversions reported, by name, of those candidates whose folder has a quantkit.json. ``base``: where
    relative paths count from."""
    found: dict[str, ConversionLosses] = {}
    for name, candidate in by_name(evaluation).items():
        path = base / candidate.model.path
        file = (path if path.is_dir() else path.parent) / CONVERSION
        if file.is_file():
            found[name] = ConversionLosses.of(_read(file, ConversionDocument, IS_CONVERSION, ""))
    return found


def by_name(evaluation: Evaluation) -> dict[str, Candidate]:
    """Candidates by their name: the last part of their path. Raises `EvaluationError` if there is none, or if two have
    the same."""
    if not evaluation.candidates:
        raise EvaluationError("evaluation: has no candidates.")
    names = [candidate.model.name for candidate in evaluation.candidates]
    for name in names:
        if names.count(name) > 1:
            raise EvaluationError(
                f"candidate {printable(name)}: found {names.count(name)} of this name, needed one.",
                hint="Baselines know candidates by their folders' names: evaluate them from folders named differently.",
            )
    return dict(zip(names, evaluation.candidates, strict=True))


def windows_of(candidate: Candidate) -> Windows:
    """The candidate's windows: `read_evaluation` and `read_baseline` made sure that there are some."""
    windows = candidate.result.windows
    assert windows is not None
    return windows


def has_layers(candidate: Candidate) -> bool:
    """Whether hidden states were compared: a reference's file has none."""
    return all(windows_of(candidate).layers)


def check_comparable(evaluation: Evaluation, baseline: Baseline, path: Path) -> None:
    """Raise `EvaluationError`, one line, if a comparison with the baseline at ``path`` would say nothing."""
    old = baseline.evaluation
    check_windows("evaluation", evaluation)
    facts: Mapping[str, tuple[object, object]] = {
        "protocol": (old.protocol.name, evaluation.protocol.name),
        "context": (old.protocol.context, evaluation.protocol.context),
        "scored tokens of a window": (old.protocol.scored_per_window, evaluation.protocol.scored_per_window),
        "reference": (old.reference.fingerprint[:16], evaluation.reference.fingerprint[:16]),
        "share of the reference's logits": (_kept(old), _kept(evaluation)),
        "windows": (len(old.window_domains), len(evaluation.window_domains)),
        "text": (old.tokens_sha256[:16], evaluation.tokens_sha256[:16]),
        "domains of the windows": (old.window_domains, evaluation.window_domains),
        "layers": (_layers(old), _layers(evaluation)),
        "routed experts": (_experts(old), _experts(evaluation)),
    }
    for what, (was, found) in facts.items():
        if was != found:
            sides = f": {printable(str(was))} in the baseline, {printable(str(found))} in the evaluation"
            shown = "" if isinstance(was, tuple) else sides
            raise EvaluationError(
                f"{path}: not comparable, another {what}{shown}.",
                hint="Evaluate with the baseline's options, text and reference, or make a new one: --update-baseline.",
            )


# --------------------------------------------------------------------------------------------------------------- parts


def _layers(evaluation: Evaluation) -> int:
    return len(evaluation.candidates[0].result.layers) if evaluation.candidates else 0


def _kept(evaluation: Evaluation) -> str:
    """Divergences from the most likely tokens of a reference's file are lower bounds."""
    file = evaluation.reference_file
    return "all" if file is None else f"{file.top} a token"


def _experts(evaluation: Evaluation) -> tuple[int, ...]:
    """Number of routed experts of each layer."""
    return tuple(len(layer.expert_errors or ()) for layer in evaluation.candidates[0].result.layers)


def _read(path: Path, model: type[_Model], what: str, hint: str) -> _Model:
    """``what`` is expected there, and ``hint`` says how it is made."""
    try:
        content = document_bytes(path)
    except QuantkitError as error:
        raise EvaluationError(error.message, hint=error.hint) from None
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        raise _no_document(path, content, what, hint, error) from None


def _no_document(path: Path, content: bytes, what: str, hint: str, error: ValidationError) -> EvaluationError:
    """Another document of quantkit is named; what is none, by the first thing that is wrong."""
    try:
        kind = kind_of(path, content)
    except QuantkitError:
        kind = ""
    if kind and not kind.startswith(what):
        return EvaluationError(f"{path}: is {kind}, not {what}.", hint=hint)
    return EvaluationError(f"{path}: is not {what} of this version: {first_problem(error)}.")


def _check_version(path: Path, evaluation: Evaluation, what: str) -> None:
    """A later version may mean something else by the same keys."""
    if evaluation.schema_version not in SCHEMA_VERSIONS:
        raise EvaluationError(
            f"{path}: is not {what} of this version: found schema_version {evaluation.schema_version}, needed "
            f"{' or '.join(map(str, SCHEMA_VERSIONS))}."
        )


def check_windows(where: Path | str, evaluation: Evaluation) -> None:
    """What pairing needs is there, and fits together. ``where``: the file, or what else the message starts with."""
    if not evaluation.candidates:
        raise EvaluationError(f"{where}: has no candidates.")
    n_windows = len(evaluation.window_domains)
    for candidate in evaluation.candidates:
        windows = candidate.result.windows
        if windows is None or not n_windows:
            raise EvaluationError(
                f"{where}: has no scores by window, which version 2 of the document has.", hint="Evaluate again."
            )
        lengths = {len(windows.loss), len(windows.kld), *map(len, filter(None, windows.layers))}
        shapes = [
            (len(x.expert_errors or ()), len(x.expert_tokens or ()) if x.expert_errors is not None else 0)
            for x in candidate.result.layers  # of a reference that was read from a file only the tokens are known
        ]
        first = [(len(x.expert_errors or ()),) * 2 for x in evaluation.candidates[0].result.layers]
        if lengths != {n_windows} or len(windows.layers) != _layers(evaluation) or shapes != first:
            raise EvaluationError(
                f"{where}: {printable(candidate.model.name)}: scores by window contradict each other."
            )
    if n_windows < MIN_WINDOWS:
        raise EvaluationError(
            f"{where}: found {n_windows} windows, needed {MIN_WINDOWS} to tell a regression from noise.",
            hint="Evaluate more text, or the same in a smaller --context.",
        )
