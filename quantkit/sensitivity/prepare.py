"""Everything about a Fisher pass that can be known to fail without torch: source, text, folder."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quantkit.arch.base import ModelArch
from quantkit.calibrate.dataset import Calibration, TokenRows, token_rows
from quantkit.errors import CalibrationError
from quantkit.evaluate.open import tokenizer_sha256
from quantkit.formats import open_source
from quantkit.formats.model_source import ModelSource
from quantkit.formats.storage import LOCAL, Storage
from quantkit.plan.decide import Problems
from quantkit.plan.headers import headers_of, zero_limits
from quantkit.plan.lengths import check_length
from quantkit.plan.plan import largest_layer
from quantkit.plan.source_tensors import listed_specs, match_source
from quantkit.sensitivity.folder import refuse_other_model, refuse_taken
from quantkit.tensors import TensorInfo

DEFAULT_DATA = ("builtin:mixed",)
DEFAULT_LENGTH = 2048


@dataclass(frozen=True, slots=True)
class Text:
    """What a caller wants of the text: files (none: `DEFAULT_DATA`), tokens of it, tokens of a row (None:
    `DEFAULT_LENGTH`, or what the model is made for if less), and the seed of places and labels."""

    data: tuple[str, ...]
    tokens: int
    sequence_length: int | None
    seed: int

    def calibration(self, arch: ModelArch) -> Calibration:
        """As settings of `token_rows`. Raises `CalibrationError` for numbers that are none, `PlanError` for rows that
        are longer than the model is made for."""
        most = min(arch.serving().max_positions, arch.longest_exact or DEFAULT_LENGTH)
        length = min(DEFAULT_LENGTH, most) if self.sequence_length is None else self.sequence_length
        if self.tokens < 1 or length < 2 or self.seed < 0:
            raise CalibrationError(
                f"found tokens {self.tokens}, sequence_length {length} and seed {self.seed}, "
                "needed at least 1, 2 and 0."
            )
        check_length("--sequence-length", length, arch)
        data = self.data or DEFAULT_DATA
        return Calibration(data=data, tokens=self.tokens, sequence_length=length, seed=self.seed)


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
    source: Path, folder: Path, text: Text, *, restart: bool, force: bool, storage: Storage = LOCAL
) -> Generator[FisherRequest]:
    """Open the checkpoint in folder ``source``, whose shards ``storage`` opens, and cut the text. Loads no torch and
    changes nothing on the disk. ``force``: ``restart`` may replace another checkpoint's pass.

    Raises a `QuantkitError` in one line for a source, text or folder that cannot be used.
    """
    refuse_taken(folder, restart=restart)
    with open_source(source, storage) as opened:
        if restart and not force:
            refuse_other_model(folder, opened.fingerprint())
        headers = headers_of(opened)
        arch = headers.arch
        storage.check_room(source, largest_layer(arch, headers.infos, headers.stored), "the largest layer")
        _check_tensors(arch, opened.infos())
        settings = text.calibration(arch)
        opened.refuse_zeros(zero_limits(arch))
        rows = token_rows(settings, opened.directory, Path())
        yield FisherRequest(opened, arch, rows, text.seed, tokenizer_sha256(source), folder, restart)


def _check_tensors(arch: ModelArch, infos: Mapping[str, TensorInfo]) -> None:
    """Raise `PlanError` for tensors that a plan would refuse: missing, unexpected, or of another shape."""
    problems = Problems()
    match_source(arch, listed_specs(arch, infos), infos, problems)
    problems.raise_if_any()
