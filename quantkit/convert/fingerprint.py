"""What a resumed job must have in common with the one that was interrupted, so that its bytes are the same."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch

from quantkit.calibrate.dataset import TokenRows
from quantkit.calibrate.imatrix_file import ImportanceFile
from quantkit.documents.journal import JournalHeader
from quantkit.documents.pruning import Scores
from quantkit.documents.sensitivity import SensitivityDocument
from quantkit.formats.model_source import ModelSource
from quantkit.formats.safetensors.reader import read_small
from quantkit.formats.tiktoken_model import TIKTOKEN, tokenizer_file
from quantkit.plan.machine import Machine
from quantkit.plan.recipe import Recipe
from quantkit.sensitivity.open import Sensitivity
from quantkit.version import __version__

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


def journal_header(
    recipe: Recipe,
    source: ModelSource,
    rows: TokenRows | None,
    importance: ImportanceFile | None,
    sensitivity: Sensitivity | None,
    scores: Scores | None,
    machine: Machine,
) -> JournalHeader:
    """The journal's first line. Device and threads are in it: sums in another order may round a code the other way."""
    stated = {"origin": source.origin} if source.origin else {}
    if scores is not None:
        stated["expert_scores"] = sha256_of_text(json.dumps(sorted(scores.items())))
    return JournalHeader(
        **stated,
        quantkit_version=f"{__version__}, sources {_sources()[:12]}",
        torch_version=torch.__version__,
        recipe=sha256_of_text(recipe.model_dump_json(exclude={"validation", "allow_zeros"})),
        source=source.fingerprint(),
        tokenizer=_tokenizer(source.directory),
        calibration_text=None if rows is None else hashlib.sha256(rows.tokens.tobytes()).hexdigest(),
        imatrix=None if importance is None else importance.sha256,
        sensitivity=None if sensitivity is None else pass_sha256(sensitivity.document),
        device=machine.device_name,
        threads=torch.get_num_threads(),
        memory_budget=machine.budget,
        source_files=dict(source.states()),
    )


def pass_sha256(document: SensitivityDocument) -> str:
    """Hex digest of a Fisher pass, without its model's name, and the losses that plans add to its document later."""
    return sha256_of_text(document.model_copy(update={"losses": None, "model": ""}).to_json())


def _tokenizer(directory: Path) -> str:
    """Hex digest of the files that turn text into tokens and go along with the weights."""
    digest = hashlib.sha256()
    extra = (TIKTOKEN,) if tokenizer_file(directory).name == TIKTOKEN else ()
    for name in (*_TOKENIZER_FILES, *extra):
        content = read_small(directory / name) if os.path.lexists(directory / name) else b""
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _sources() -> str:
    """Hex digest of the package's own code: a checkout that was updated is another one."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def sha256_of_text(text: str) -> str:
    """Hex digest of UTF-8 text."""
    return hashlib.sha256(text.encode()).hexdigest()
