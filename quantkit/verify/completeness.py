"""Stored tensors against those that the family lists, stored as config.json says: names, shapes, dtypes.

No runtime does this for quantised modules: vLLM 0.24 and 0.33 load a checkpoint that lacks an expert's tensor, or all
of a linear, without a word (its weight tracking leaves quantised modules out), and narrow what is too small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from quantkit.formats.planned import PlannedTensor
from quantkit.formats.safetensors.reader import SafetensorsSource
from quantkit.tensors import Role, TensorInfo
from quantkit.verify.checkpoint import Checkpoint

_FLOATS = ("BF16", "F16", "F32")
_INTEGERS = ("I32", "I64")
_OPTIONAL = (".weight_shape", ".g_idx")
"""Parts that runtimes do without."""
_ANY_LENGTH = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
"""Text, which tools write differently."""
_SHOWN = 3


def faults(checkpoint: Checkpoint) -> Iterator[str]:
    """One line for each kind of fault, with the first tensors that have it."""
    stored, variants = checkpoint.raw.infos(), checkpoint.arch.variants()
    mtp = stored_mtp_layers(checkpoint)
    present = [tensor for tensor in checkpoint.planned if tensor.role is not Role.MTP or tensor.layer in mtp]
    missing: list[str] = []
    shapes: list[str] = []
    dtypes: list[str] = []
    packed: list[str] = []
    known: set[str] = set()
    for tensor in present:
        if tensor.name in checkpoint.read:
            known.update(checkpoint.read[tensor.name])
            continue
        needed = checkpoint.needed(tensor)
        known.update(info.name for info in needed)
        if tensor.scheme is not None and tensor.name in stored and needed[0].name not in stored:
            found = _stored_as(stored[tensor.name])
            packed.append(f"{tensor.name} is stored {found}, by config.json it is {tensor.scheme.label}")
            known.add(tensor.name)
            continue
        if tensor.scheme is None and tensor.name not in stored and _is_packed(tensor, stored):
            packed.append(f"{tensor.name} is stored quantised, by config.json it is not")
            continue
        for info in needed:
            found = stored.get(info.name)
            if found is None:
                if not info.name.endswith(_OPTIONAL) and info.name not in variants.copies:
                    missing.append(info.name)
            elif found.shape != info.shape and not info.name.endswith(_ANY_LENGTH):
                shapes.append(f"{info.name} is {list(found.shape)}, needed {list(info.shape)}")
            elif not _same_kind(found, info):
                dtypes.append(f"{info.name} is {found.dtype}, needed {info.dtype}")
    lost = {name for _, names in checkpoint.unreadable.values() for name in names}
    missing = [name for name in missing if name not in lost]
    yield from (message for message, _ in checkpoint.unreadable.values())
    yield from _line(missing, "missing", "Runtimes load such a checkpoint without a word and compute nonsense.")
    if checkpoint.unreadable:
        return  # of a linear whose parts lie in several shards too little is known to judge the others
    yield from _line(shapes, "of another shape", "vLLM copies a part of what is smaller and refuses what is larger.")
    yield from _line(dtypes, "of another dtype", "")
    yield from _line(packed, "stored otherwise than config.json says", "")
    yield from _line(_strangers(checkpoint, known), "not of this architecture", "vLLM ends with a KeyError at them.")


def notes(checkpoint: Checkpoint) -> Iterator[str]:
    """What differs from the family's list without harm."""
    stored, variants = checkpoint.raw.infos(), checkpoint.arch.variants()
    derived = [name for name in stored if _matches(name, variants.derived)]
    narrowed = [
        tensor.name
        for tensor in checkpoint.planned
        if tensor.spec is not None and tensor.spec.float32 and tensor.scheme is None and tensor.keep_dtype != "F32"
    ]
    widened = [
        tensor.name
        for tensor in checkpoint.planned
        if tensor.spec is not None and not tensor.spec.float32 and tensor.keep_dtype == "F32" and tensor.name in stored
    ]
    yield from _line(derived, "buffers that follow from config.json", "Runtimes leave them out.")
    yield from _line([name for name in narrowed if name in stored], "float32 in the official release and not here", "")
    yield from _line(widened, "float32 here and 16 bits in the official release", "They take twice the space.")
    yield from _line(list(checkpoint.raw.unlisted), "in the shards but not in the index", "No runtime sees them.")


def vision_notes(checkpoint: Checkpoint, source: Path) -> Iterator[str]:
    """A line if the original has a vision tower that the folder lacks. Raises `SourceError` for a damaged original."""
    carried = checkpoint.arch.variants().carried
    if not carried or any(tensor.role is Role.VISION for tensor in checkpoint.planned):
        return
    if not any(source.glob("*.safetensors")):
        return  # GGUF has no vision tower either
    with SafetensorsSource(source) as original:
        lost = [name for name in original.infos() if _matches(name, carried)]
    yield from _line(lost, "vision tensors of the original, not here", "The language model alone takes no images.")


def stored_mtp_layers(checkpoint: Checkpoint) -> set[int]:
    """Numbers of the MTP layers of which anything is stored; the others were dropped as a whole."""
    layers = {
        f"{tensor.name.partition(f'.{tensor.layer}.')[0]}.{tensor.layer}.": tensor.layer
        for tensor in checkpoint.planned
        if tensor.role is Role.MTP and tensor.layer is not None
    }
    names = checkpoint.raw.infos()
    return {number for prefix, number in layers.items() if any(name.startswith(prefix) for name in names)}


def _stored_as(found: TensorInfo) -> str:
    return "unquantised" if found.dtype in _FLOATS else f"as {found.dtype}, a number for each weight"


def _is_packed(tensor: PlannedTensor, stored: Mapping[str, TensorInfo]) -> bool:
    return any(f"{tensor.module}.{part}" in stored for part in ("weight_packed", "qweight"))


def _same_kind(found: TensorInfo, needed: TensorInfo) -> bool:
    """Floats are converted by every loader, and the parts that runtimes do without may be any integers."""
    kind = _INTEGERS if needed.name.endswith(_OPTIONAL) else _FLOATS
    return found.dtype == needed.dtype or {found.dtype, needed.dtype} <= set(kind)


def _strangers(checkpoint: Checkpoint, known: set[str]) -> list[str]:
    variants = checkpoint.arch.variants()
    return [
        name
        for name in checkpoint.raw.infos()
        if name not in known and name not in variants.tied and not _matches(name, variants.derived)
    ]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _line(names: list[str], what: str, consequence: str) -> Iterator[str]:
    if names:
        more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
        yield f"{what}: {', '.join(names[:_SHOWN])}{more}. {consequence}".rstrip()
