"""What `plan` needs of a source: config.json and tensor headers. From shards if there are any, else derived from
config.json alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from quantkit.arch import arch_of
from quantkit.arch.base import ModelArch
from quantkit.errors import PlanError, SourceError
from quantkit.formats.folder import object_of
from quantkit.formats.fp8_source import SCALE_SUFFIX
from quantkit.formats.layouts import compressed_tensors
from quantkit.formats.model_source import ModelSource
from quantkit.formats.planned import PlannedTensor
from quantkit.formats.safetensors.header import INDEX_NAME
from quantkit.formats.safetensors.reader import read_index
from quantkit.formats.safetensors.zero_tail import ZERO_ROWS
from quantkit.formats.side_files import folder_notes
from quantkit.formats.source import (
    PACKED_METHOD,
    check_folder,
    float8_block_size,
    quant_method,
    quantization_section,
    read_config,
)
from quantkit.formats.storage import LOCAL, Storage
from quantkit.plan.gguf_model import config_folder, is_gguf_model, open_model
from quantkit.plan.source_tensors import contradicts_tied, note_of_copies, shared_copies, unfounded_mtp
from quantkit.schemes import Float8Scheme, Scheme
from quantkit.tensors import Role, TensorInfo, TensorSpec

LEAST_ZEROS = 32_768
"""64 KiB of BF16: the smallest piece in which downloads come. 4.6 rows of DeepSeek V3's hidden size."""


@dataclass(frozen=True, slots=True)
class SourceHeaders:
    """A source as a plan sees it: ``infos`` decoded; ``stored``: what linears are stored in that are not plain.
    ``has_shards``: False if all was derived from config.json. ``notes``: what is unusual about the folder, a line
    each; ``zeros``: shards that end in rows of zeros or have holes, a line each; ``files``: what holds the
    weights, all in one folder; ``directory``: of config.json and tokenizer; ``origin``: of a remote source."""

    directory: Path
    config: Mapping[str, object]
    arch: ModelArch
    infos: Mapping[str, TensorInfo]
    stored: Mapping[str, Scheme]
    has_shards: bool
    notes: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    origin: str = ""

    @property
    def path(self) -> Path:
        """What the user named: the folder, or the GGUF file (the first of a split set)."""
        return self.files[0] if self.files and self.files[0].suffix == ".gguf" else self.directory


def read_headers(
    directory: Path | str, config_directory: Path | None = None, storage: Storage = LOCAL
) -> SourceHeaders:
    """Headers of a checkpoint folder, or of GGUF with config.json and tokenizer in ``config_directory`` (see
    `open_model`); a folder with only config.json (and perhaps an index) counts as the official release of it.

    Raises `SourceError` or `ConfigError` for a damaged folder, `PlanError` if an index without shards does not list
    what config.json needs.
    """
    directory = Path(directory)
    if is_gguf_model(directory) or any(directory.glob("*.safetensors")):
        with open_model(directory, config_directory, storage) as source:
            return headers_of(source)
    config_folder(directory, config_directory)
    check_folder(directory)
    config = read_config(directory)
    arch = arch_of(config)
    infos, stored = headers_from_arch(arch, config, directory)
    if (directory / INDEX_NAME).exists():
        _check_index(directory, arch, infos, stored)
    return SourceHeaders(directory, config, arch, infos, stored, False)


def headers_of(source: ModelSource) -> SourceHeaders:
    """Headers of an open checkpoint, which from then on shows the main model's tensors where MTP layers lack their
    copies of them.

    Raises `ConfigError` for an architecture that is not known, `SourceError` for a head that contradicts tied
    embeddings and for a layer of the decoder that config.json counts as an MTP layer.
    """
    arch = arch_of(source.config)
    _check_tied(source, arch)
    _check_mtp(source, arch)
    notes = (*source.notes, *_share_copies(source, arch), *folder_notes(source.directory))
    return SourceHeaders(
        source.directory,
        source.config,
        arch,
        source.infos(),
        {name: scheme for name in source.infos() if (scheme := source.stored_as(name)) is not None},
        True,
        notes,
        source.zeros(zero_limits(arch)),
        source.files,
        source.origin,
    )


def zero_limits(arch: ModelArch) -> dict[str, int]:
    """By the name of a matrix how many zeros in a row no trained model has, but a file with a hole.

    Rows of a vocabulary that no text has may be zero, up to 1 % of them in a row. In other matrices some rows may be:
    dead units, which FP8 rounds to zero. Vectors, such as biases, may be zero as a whole.
    """
    limits: dict[str, int] = {}
    for spec in arch.tensors():
        if len(spec.shape) > 1:
            vocabulary = spec.base_role in (Role.EMBED, Role.LM_HEAD)
            some_rows = (int(ZERO_ROWS * spec.shape[0]) + 1) * spec.shape[1] if vocabulary else 0
            limits[spec.name] = max(LEAST_ZEROS, some_rows)
    return limits


def headers_from_arch(
    arch: ModelArch, config: Mapping[str, object], directory: Path = Path()
) -> tuple[dict[str, TensorInfo], dict[str, Scheme]]:
    """The decoded view that an official checkpoint of this config has, and what its linears are stored in.

    BF16, F32 where the release stores F32; FP8 linears if ``quantization_config`` says fp8, packed ones (decoded:
    F32) as one of compressed-tensors says. Raises `SourceError` for what is quantised in another way.
    """
    scheme_of = _stated_schemes(config, directory)
    infos: dict[str, TensorInfo] = {}
    stored: dict[str, Scheme] = {}
    for spec in arch.tensors():
        scheme = scheme_of(spec) if spec.linear else None
        plain = scheme is None or isinstance(scheme, Float8Scheme)
        infos[spec.name] = TensorInfo(spec.name, spec.shape, "F32" if spec.float32 or not plain else "BF16")
        if scheme is not None:
            stored[spec.name] = scheme
    return infos, stored


def _stated_schemes(config: Mapping[str, object], directory: Path) -> Callable[[TensorSpec], Scheme | None]:
    """What config.json says that a linear is stored in."""
    if quant_method(config) == PACKED_METHOD:
        where = str(directory / "config.json")
        section = object_of(where, "quantization_config", quantization_section(config))
        resolver = compressed_tensors.resolver_of(where, section)
        return lambda spec: resolver.scheme(spec.name.removesuffix(".weight"))
    block_size = float8_block_size(directory, config)
    float8 = None if block_size is None else Float8Scheme(block_size=block_size)
    return lambda spec: float8


def _check_tied(source: ModelSource, arch: ModelArch) -> None:
    """Raise `SourceError` for a head that is not the embedding, where config.json says that it is."""
    found = contradicts_tied(arch.variants(), source.infos(), source.equal)
    if found is not None:
        name, line = found
        raise SourceError(
            f"{source.path_of(name)}: {line}",
            hint='If the model has a head of its own, set "tie_word_embeddings": false in config.json.',
        )


def _check_mtp(source: ModelSource, arch: ModelArch) -> None:
    """Raise `SourceError` for a layer of the decoder that would be dropped as an MTP layer."""
    line = unfounded_mtp(arch, source.infos())
    if line:
        raise SourceError(
            f"{source.directory / 'config.json'}: {line}",
            hint="num_hidden_layers in config.json is wrong: it counts all layers of the source but the MTP layers.",
        )


def _share_copies(source: ModelSource, arch: ModelArch) -> tuple[str, ...]:
    """Show copies that MTP layers leave out -> a note about each."""
    shared = shared_copies(arch, source.infos())
    source.share(shared)
    return note_of_copies(shared)


def _check_index(
    directory: Path, arch: ModelArch, infos: Mapping[str, TensorInfo], stored: Mapping[str, Scheme]
) -> None:
    variants = arch.variants()
    needed = {part for info in infos.values() for part in _parts(info, stored.get(info.name))}
    listed = {name for name in read_index(directory) if not any(fnmatchcase(name, glob) for glob in variants.derived)}
    listed |= set(variants.copies)
    if listed == needed:
        return
    missing, unexpected = sorted(needed - listed), sorted(listed - needed)
    found = f"lacks {len(missing):,} tensors" + (f" (such as {missing[0]})" if missing else "")
    if unexpected:
        found += f" and lists {len(unexpected):,} unknown ones (such as {unexpected[0]})"
    raise PlanError(f"{directory / INDEX_NAME}: {found}, needed the {len(needed):,} that config.json describes.")


def _parts(info: TensorInfo, scheme: Scheme | None) -> tuple[str, ...]:
    """Names of the tensors that store a weight."""
    if scheme is None:
        return (info.name,)
    if isinstance(scheme, Float8Scheme):
        return info.name, info.name + SCALE_SUFFIX
    planned = PlannedTensor(info, scheme, None)
    return tuple(part.name for part in compressed_tensors.COMPRESSED_TENSORS.stored(planned))
