"""Everything about a Fisher pass that can be known to fail without torch: source, text, folder."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quantkit.arch.base import ModelArch
from quantkit.calibrate.dataset import Calibration, TokenRows, token_rows
from quantkit.evaluate.open import tokenizer_sha256
from quantkit.formats import open_source
from quantkit.formats.model_source import ModelSource
from quantkit.plan.headers import headers_of, zero_limits
from quantkit.plan.lengths import check_length
from quantkit.sensitivity.folder import refuse_taken

DEFAULT_DATA = ("builtin:mixed",)
DEFAULT_TOKENS = 32_768
DEFAULT_LENGTH = 2048


@dataclass(frozen=True, slots=True)
class FisherRequest:
    """A pass that nothing known speaks against. ``source``: open; ``seed``: of the labels; ``tokenizer``: sha256."""

    source: ModelSource
    arch: ModelArch
    rows: TokenRows
    seed: int
    tokenizer: str | None
    folder: Path
    restart: bool


@contextmanager
def prepared(
    source: Path, folder: Path, text: Calibration, *, base_dir: Path, restart: bool
) -> Generator[FisherRequest]:
    """Open the checkpoint in folder ``source`` and cut the text. Loads no torch and changes nothing on the disk.

    Raises a `QuantkitError` in one line for a source, text or folder that cannot be used.
    """
    refuse_taken(folder, restart=restart)
    with open_source(source) as opened:
        arch = headers_of(opened).arch
        check_length("--sequence-length", text.sequence_length, arch)
        opened.refuse_zeros(zero_limits(arch))
        rows = token_rows(text, opened.directory, base_dir)
        yield FisherRequest(opened, arch, rows, text.seed, tokenizer_sha256(source), folder, restart)
