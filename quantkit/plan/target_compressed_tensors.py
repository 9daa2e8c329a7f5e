"""compressed-tensors as a `Target`: official names, one folder of safetensors with the source's side files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.arch.base import ModelArch
from quantkit.errors import SchemeError
from quantkit.formats.layouts import compressed_tensors
from quantkit.formats.layouts.compressed_tensors_config import quantization_config
from quantkit.formats.planned import PlannedTensor
from quantkit.plan.recipe import CompressedTensorsOutput, Rule
from quantkit.runtimes.vllm import contract
from quantkit.schemes import ChosenScheme, GgmlScheme, describe
from quantkit.tensors import TensorSpec

if TYPE_CHECKING:
    from quantkit.formats.layouts.compressed_tensors import CompressedTensorsSink
    from quantkit.formats.layouts.compressed_tensors_source import CompressedTensorsSource


class CompressedTensorsTarget:
    """A `Target`."""

    label: str = "compressed-tensors"

    def __init__(self, output: CompressedTensorsOutput, arch: ModelArch) -> None:
        self.specs: tuple[TensorSpec, ...] = tuple(arch.tensors())
        self._output = output

    def omits(self, spec: TensorSpec) -> bool:
        """Nothing: rules say what is dropped."""
        return False

    @property
    def companion_bytes(self) -> int:
        """Only small files."""
        return 0

    def preset_rule(self, spec: TensorSpec) -> Rule | None:
        """There are no presets: rules say it all."""
        return None

    def fitting(self, spec: TensorSpec, scheme: ChosenScheme) -> ChosenScheme:
        """The scheme itself. Raises `SchemeError` for a block type of ggml."""
        if isinstance(scheme, GgmlScheme):
            raise SchemeError(
                f"{spec.name}: compressed-tensors cannot store {describe(scheme)}.",
                hint="Block types of ggml go into outputs of format: gguf.",
            )
        return scheme

    def kept_dtype(self, spec: TensorSpec, dtype: str) -> str:
        """As asked."""
        return dtype

    def nbytes(self, tensor: PlannedTensor) -> int:
        """Codes, scales and shapes, or the tensor itself."""
        return sum(info.nbytes for info in compressed_tensors.stored(tensor))

    def problems(self, tensors: Sequence[PlannedTensor]) -> list[str]:
        """See `contract.problems`."""
        return contract.problems(tensors)

    def notes(self, tensors: Sequence[PlannedTensor]) -> list[str]:
        """See `contract.notes`."""
        return contract.notes(tensors)

    def check_source(self, source: Path) -> None:
        """Files are copied as they are."""

    def open_sink(self, directory: Path, source: Path, tensors: Sequence[PlannedTensor]) -> CompressedTensorsSink:
        """See `CompressedTensorsSink.open`."""
        return compressed_tensors.CompressedTensorsSink.open(directory, tensors, self._output.max_shard_bytes)

    def write_side_files(
        self, directory: Path, source: Path, config: Mapping[str, object], tensors: Sequence[PlannedTensor], mtp: bool
    ) -> None:
        """config.json with the new quantization_config, and copies of the tokenizer's and the licence's files."""
        from quantkit.formats.bundle import copy_side_files, write_config

        write_config(directory, config, quantization_config(tensors), mtp_dropped=not mtp)
        copy_side_files(source, directory)

    def serve_commands(self, source: Path, tensors: Sequence[PlannedTensor], folder: str = ".") -> tuple[str, ...]:
        """vLLM on the folder."""
        return (f"vllm serve {folder}",)

    def open_written(self, directory: Path) -> CompressedTensorsSource:
        """See `CompressedTensorsSource`."""
        from quantkit.formats.layouts.compressed_tensors_source import CompressedTensorsSource

        return CompressedTensorsSource(directory)
