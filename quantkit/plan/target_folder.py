"""Every layout of a folder as a `Target`: official names, one folder of safetensors with the source's side files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from quantkit.arch.base import ServingSizes
from quantkit.errors import SchemeError
from quantkit.formats.folder import FolderLayout, FolderSink, FolderSource
from quantkit.formats.fp8_source import Fp8Source
from quantkit.formats.planned import PlannedTensor
from quantkit.formats.source import open_plain, quant_method, read_config
from quantkit.plan.named_schemes import named_schemes
from quantkit.plan.recipe import FolderOutput, Rule
from quantkit.runtimes import int4_g32, mlx, transformers
from quantkit.runtimes.vllm import command, contract
from quantkit.schemes import ChosenScheme, Scheme
from quantkit.tensors import TensorSpec


class FolderTarget:
    """A `Target`."""

    keep_mtp: str = '{match: "role:mtp", keep: source} in place of the rule that drops them'

    def __init__(
        self, output: FolderOutput, layout: FolderLayout, specs: tuple[TensorSpec, ...], sizes: ServingSizes
    ) -> None:
        self.label: str = layout.reader.label
        self.specs: tuple[TensorSpec, ...] = specs
        self._output = output
        self._layout = layout
        self._sizes = sizes

    def omits(self, spec: TensorSpec) -> bool:
        """False: only rules say what is dropped."""
        return False

    @property
    def wants_mtp_importance(self) -> bool:
        """No: a folder has no place for importance."""
        return False

    @property
    def companion_bytes(self) -> int:
        """0: there are only small files."""
        return 0

    def preset_rule(self, spec: TensorSpec) -> Rule | None:
        """There are no presets: rules say it all."""
        return None

    def fitting(self, spec: TensorSpec, scheme: ChosenScheme) -> ChosenScheme:
        """The scheme itself. Raises `SchemeError` for one that the layout cannot store."""
        self._layout.check(spec.name, spec.shape, scheme)
        return scheme

    def exact_rule(self, spec: TensorSpec, stored: Scheme) -> str | None:
        """keep: source, where the layout has the scheme."""
        try:
            self._layout.check(spec.name, spec.shape, stored)
        except SchemeError:
            return None
        return "keep: source"

    def kept_dtype(self, spec: TensorSpec, dtype: str) -> str:
        """The dtype that was asked for."""
        return dtype

    def nbytes(self, tensor: PlannedTensor) -> int:
        """What the layout stores, scales and the like included, or the tensor itself."""
        return sum(info.nbytes for info in self._layout.infos(tensor))

    def choices(self, names: Sequence[str]) -> tuple[ChosenScheme, ...]:
        """Integers that vLLM multiplies."""
        return named_schemes({scheme.label: scheme for scheme in contract.CHOICES}, names, contract.CHOICES)

    def joined(self, spec: TensorSpec) -> str:
        """The module of vLLM."""
        return contract.joined(spec)

    def unchosen(self, spec: TensorSpec) -> ChosenScheme | None:
        """8 bits for linears; tables are kept, as vLLM reads them."""
        return contract.UNSEEN if spec.linear else None

    def file_bytes(self, source: Path, tensors: Sequence[PlannedTensor]) -> int:
        """Shards and their index."""
        from quantkit.formats.safetensors.writer import layout_shards

        layout = layout_shards(map(self._layout.infos, tensors), self._output.max_shard_bytes)
        return layout.nbytes + len(layout.index())

    def problems(self, tensors: Sequence[PlannedTensor]) -> list[str]:
        """What the layout cannot store (FP8 weights that are kept) or say, and what vLLM would not load."""
        refused = [line for tensor in tensors if (line := self._refusal(tensor))]
        return [*refused, *self._layout.problems(tensors), *contract.problems(tensors, self._output.format)]

    def notes(self, tensors: Sequence[PlannedTensor]) -> list[str]:
        """What runtimes will not take of the layout, or take otherwise than asked."""
        layout = self._output.format
        runtimes = (contract.notes, transformers.problems, transformers.notes, mlx.notes, int4_g32.notes)
        found = [line for of_runtime in runtimes for line in of_runtime(tensors, layout)]
        return [*contract.attention_notes(self._sizes), *found]

    def check_source(self, source: Path) -> tuple[str, ...]:
        """See `check_side_files`."""
        from quantkit.formats.side_files import check_side_files

        check_side_files(source)
        return ()

    def open_sink(self, directory: Path, source: Path, tensors: Sequence[PlannedTensor]) -> FolderSink:
        """See `FolderSink.open`."""
        return FolderSink.open(self._layout, directory, tensors, self._output.max_shard_bytes)

    def write_side_files(
        self, directory: Path, source: Path, config: Mapping[str, object], tensors: Sequence[PlannedTensor], mtp: bool
    ) -> None:
        """config.json with the new quantization_config, and copies of the tokenizer's and the licence's files."""
        from quantkit.formats.bundle import write_config
        from quantkit.formats.side_files import copy_side_files

        write_config(directory, config, self._layout.config(tensors), mtp_dropped=not mtp)
        copy_side_files(source, directory)

    def serve_commands(self, source: Path, tensors: Sequence[PlannedTensor], folder: str = ".") -> tuple[str, ...]:
        """vLLM on the folder, or transformers where vLLM does not read the layout."""
        if self._output.format == contract.BITSANDBYTES:
            return (transformers.load(folder),)
        # The layouts of GPTQ and AWQ store scales in float16 alone, and are served in either.
        halves = tensors if self._output.format == contract.COMPRESSED_TENSORS else ()
        return (command.serve(folder, halves),)

    def open_written(self, directory: Path) -> FolderSource | Fp8Source:
        """See `FolderSource`; a checkpoint of which nothing is quantised is a plain one."""
        if quant_method(read_config(directory)) is None:
            return open_plain(directory)
        return FolderSource(directory, self._layout.reader)

    def _refusal(self, tensor: PlannedTensor) -> str:
        try:
            if tensor.scheme is not None:
                self._layout.check(tensor.name, tensor.info.shape, tensor.scheme)
        except SchemeError as error:
            return f"{error.message} {error.hint}".rstrip()
        return ""
