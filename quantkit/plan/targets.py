"""The formats that a recipe's outputs may have, each as one `Target`: what planning, conversion and validation ask of
it.

Layouts of folders share one target (`target_folder`). A format of another kind has a target in a file of its own, a
member of `recipe.Output` and a line in `target_of`. Evaluation, inspection, fits on GPUs and the model card, which look
at files of any origin, name it once more each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from quantkit.arch.base import ModelArch
from quantkit.formats.planned import PlannedTensor
from quantkit.plan.recipe import Output, Recipe, Rule
from quantkit.schemes import ChosenScheme, Scheme
from quantkit.tensors import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.formats.checksums import WrittenRange
    from quantkit.formats.preallocated import Steps
    from quantkit.schemes import QuantizedTensor
    from quantkit.tensors import RowSource


class Sink(Protocol):
    """A checkpoint being written: every tensor at an offset known before the work began, in any order, as often as need
    be. `write` may run in one thread while `write_importance` runs in another."""

    @property
    def fresh(self) -> bool:
        """True if the files were created just now: a journal that says tensors are written is then not theirs."""
        ...

    def write(self, tensor: QuantizedTensor, start_row: int = 0) -> None:
        """Store a quantised linear, or its rows from ``start_row`` on. Raises `SchemeError` for a scale that is not
        finite, `OutputError` for a full disk."""
        ...

    def write_kept(self, name: str, start_row: int, tensor: Tensor) -> None:
        """Store rows of a kept tensor, cast to its planned dtype."""
        ...

    def wants_importance(self, name: str) -> bool:
        """Whether `write_importance` keeps what it is given of this linear."""
        ...

    def write_importance(self, name: str, importance: Tensor, n_tokens: Sequence[int]) -> None:
        """What calibration found out about a linear's inputs: importance (B, in) float32, B = 1 or the heads."""
        ...

    def sync(self) -> None:
        """Bring what was written to the disk."""
        ...

    def written(self) -> tuple[WrittenRange, ...]:
        """What was written since this was asked last, with its checksums."""
        ...

    def finish(self, steps: Steps | None = None) -> dict[str, str]:
        """Complete the files -> file name -> sha256 (hex). Raises `OutputError` naming the step if they no longer hold
        what ``steps`` wrote."""
        ...

    def close(self) -> None:
        """Give descriptors back without finishing: an interrupted job."""
        ...


class Target(Protocol):
    """One output of a recipe, joined with the model. Nothing before `open_sink` loads torch or touches a file."""

    label: str
    """What the format is called."""
    specs: tuple[TensorSpec, ...]
    """What it stores, in official order: the source's tensors, or parts of them."""

    keep_mtp: str
    """What a recipe says to store MTP layers."""

    def omits(self, spec: TensorSpec) -> bool:
        """Whether an option of the output leaves a tensor out, whatever its rules say."""
        ...

    @property
    def companion_bytes(self) -> int:
        """Bytes of large files beside the weights."""
        ...

    @property
    def wants_mtp_importance(self) -> bool:
        """Whether what the linears of MTP layers read is kept beside the weights."""
        ...

    def preset_rule(self, spec: TensorSpec) -> Rule | None:
        """What a preset says of a tensor that no rule matched."""
        ...

    def fitting(self, spec: TensorSpec, scheme: ChosenScheme) -> ChosenScheme:
        """The scheme itself, or what the format's own tools take where a shape does not fit it. Raises `SchemeError`
        if the format cannot store it for this tensor."""
        ...

    def exact_rule(self, spec: TensorSpec, stored: Scheme) -> str | None:
        """What a rule says to store a linear as its source does, in ``stored``, without rounding; None if the format
        cannot."""
        ...

    def kept_dtype(self, spec: TensorSpec, dtype: str) -> str:
        """The dtype that a kept tensor really gets."""
        ...

    def choices(self, names: Sequence[str]) -> tuple[ChosenScheme, ...]:
        """What may be chosen for a linear, all that its runtimes load by default or what ``names`` say. Raises
        `SchemeError` for a name that they do not load."""
        ...

    def joined(self, spec: TensorSpec) -> str:
        """Name of the tensor, or the module of a runtime, that holds a linear: those with the same name need one
        scheme."""
        ...

    def unchosen(self, spec: TensorSpec) -> ChosenScheme | None:
        """The scheme of a linear or table of which no sensitivity is known, None to keep it."""
        ...

    def nbytes(self, tensor: PlannedTensor) -> int:
        """Exact bytes of a tensor's data."""
        ...

    def file_bytes(self, source: Path, tensors: Sequence[PlannedTensor]) -> int:
        """Exact bytes of the files that hold the weights, headers, padding and index included. ``source``: the
        checkpoint's folder; without a tokenizer there, a GGUF's is left out."""
        ...

    def problems(self, tensors: Sequence[PlannedTensor]) -> list[str]:
        """One line for each fault that makes the output unloadable or wrong."""
        ...

    def notes(self, tensors: Sequence[PlannedTensor]) -> list[str]:
        """One line for each runtime that will not take it, or takes it otherwise than asked."""
        ...

    def check_source(self, source: Path) -> tuple[str, ...]:
        """Raise `SourceError` for files beside the weights, in folder ``source``, that the format cannot take over. A
        line for each thing that a runtime takes from them otherwise than the model."""
        ...

    def open_sink(self, directory: Path, source: Path, tensors: Sequence[PlannedTensor]) -> Sink:
        """Create the files in full size, or take up those of an interrupted job. ``source``: the checkpoint's folder,
        for its tokenizer. Raises `OutputError`, and `SourceError` for side files that the format cannot hold."""
        ...

    def write_side_files(
        self, directory: Path, source: Path, config: Mapping[str, object], tensors: Sequence[PlannedTensor], mtp: bool
    ) -> None:
        """Config, tokenizer, licence: what a runtime expects beside the weights. ``mtp``: MTP layers are stored."""
        ...

    def serve_commands(self, source: Path, tensors: Sequence[PlannedTensor], folder: str = ".") -> tuple[str, ...]:
        """Shell lines that serve the output in ``folder``, which is quoted where need be; the model card's are run
        inside it."""
        ...

    def open_written(self, directory: Path) -> AbstractContextManager[RowSource]:
        """What was written, decoded, by official names."""
        ...


def target_of(output: Output, recipe: Recipe, arch: ModelArch, specs: tuple[TensorSpec, ...]) -> Target:
    """The target of one output. ``specs``: what the source holds, see `quantkit.plan.source_tensors.listed_specs`."""
    from quantkit.formats.layouts import LAYOUTS
    from quantkit.plan.target_folder import FolderTarget
    from quantkit.plan.target_gguf import GgufTarget

    if output.format == "gguf":
        return GgufTarget(output, recipe, arch, specs)
    return FolderTarget(output, LAYOUTS[output.format], specs, arch.serving())
