"""What a source holds against what the family lists: which tensors are missing, which belong to something else, and
which differences are none.

Published checkpoints carry buffers that follow from config.json, MTP layers that it does not mention, or none although
it does. What no output keeps is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from quantkit.arch.base import CheckpointVariants, ModelArch
from quantkit.plan.decide import Action, Decision, Problems
from quantkit.tensors import Role, TensorInfo, TensorSpec

FLOAT_DTYPES = ("BF16", "F16", "F32")
"""What a decoded tensor may be stored in."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a tensor of the source cannot be used: its kind for counting, the line, a hint."""

    kind: str
    line: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class SourceTensors:
    """``infos``: every tensor that the family lists, those that are absent as BF16; ``faults``: what is wrong with
    tensors of MTP layers, by name, which matters only if they are kept; ``notes``: what is left out, a line each."""

    infos: Mapping[str, TensorInfo]
    faults: Mapping[str, Fault]
    notes: tuple[str, ...]

    def refuse_kept(self, decisions: Iterable[Decision], problems: Problems) -> None:
        """Add the faults of tensors that an output keeps or quantises."""
        for decision in decisions:
            fault = self.faults.get(decision.spec.official)
            if fault is not None and decision.action is not Action.DROP:
                problems.add(fault.kind, fault.line, fault.hint)


def listed_specs(arch: ModelArch, infos: Mapping[str, TensorInfo]) -> tuple[TensorSpec, ...]:
    """What the family lists, then what belongs to the model although nothing here computes with it, as it is there."""
    carried = arch.variants().carried
    found = (info for name, info in infos.items() if _matches(name, carried)) if carried else ()
    return (*arch.tensors(), *(TensorSpec(info.name, info.shape, Role.VISION) for info in found))


def vision_notes(arch: ModelArch, names: Iterable[str]) -> tuple[str, ...]:
    """What the outputs lack of a family with vision, if the source (GGUF) holds its language model alone."""
    carried = arch.variants().carried
    if not carried or any(_matches(name, carried) for name in names):
        return ()
    return ("The source holds the language model alone: there is no vision tower here, and images cannot be given.",)


def match_source(
    arch: ModelArch, specs: Iterable[TensorSpec], infos: Mapping[str, TensorInfo], problems: Problems
) -> SourceTensors:
    """Compare the decoded tensors of a source with those of its family. What is wrong whatever the outputs are goes to
    ``problems``."""
    used: dict[str, TensorInfo] = {}
    faults: dict[str, Fault] = {}
    for spec in specs:
        info = infos.get(spec.name)
        fault = _fault(spec, info, arch)
        if fault is not None and spec.role is Role.MTP:
            faults[spec.name] = fault
        elif fault is not None:
            problems.add(fault.kind, fault.line, fault.hint)
        used[spec.name] = info or TensorInfo(spec.name, spec.shape, "BF16")
    variants = arch.variants()
    unlisted = sort_unlisted(variants, [name for name in infos if name not in used], used)
    for name in unlisted.unexpected:
        problems.add(
            "unexpected tensors",
            f"{name}: found in the source, but this architecture has no such tensor.",
            _unexpected_hint(name, variants),
        )
    notes = list(unlisted.notes)
    absent = [name for name in faults if name not in infos]
    if absent:
        notes.append(f"{_counted(absent)} of MTP layers: not in the source. Outputs that drop them need none.")
    return SourceTensors(used, faults, tuple(notes))


def _fault(spec: TensorSpec, info: TensorInfo | None, arch: ModelArch) -> Fault | None:
    if info is None:
        return Fault(
            "missing tensors",
            f"{spec.name}: missing from the source, needed {list(spec.shape)}.",
            _missing_hint(spec, arch),
        )
    if info.shape != spec.shape:
        return Fault(
            "wrong shapes",
            f"{spec.name}: found shape {list(info.shape)}, needed {list(spec.shape)} by config.json.",
            "config.json belongs to another checkpoint.",
        )
    if info.dtype not in FLOAT_DTYPES:
        return Fault("wrong dtypes", f"{spec.name}: found dtype {info.dtype}, needed one of {', '.join(FLOAT_DTYPES)}.")
    return None


def _missing_hint(spec: TensorSpec, arch: ModelArch) -> str:
    if spec.role is Role.MTP:
        return 'Drop the MTP layer in every output (role:mtp), or set "num_nextn_predict_layers": 0 in config.json.'
    if spec.name == arch.lm_head:
        return 'A checkpoint whose head is its embedding says so: "tie_word_embeddings": true in config.json.'
    return "Fetch the missing shards, or compare config.json."


@dataclass(frozen=True, slots=True)
class Unlisted:
    """Tensors that the family does not list. ``notes``: a line for what may be left out; ``unexpected``: the others."""

    notes: tuple[str, ...]
    unexpected: tuple[str, ...]


def sort_unlisted(variants: CheckpointVariants, unknown: Collection[str], known: Collection[str]) -> Unlisted:
    """``known``: names that the family lists and the checkpoint has or should have. What ``tied`` names is taken to be
    equal: see `contradicts_tied`."""
    derived = [name for name in unknown if _matches(name, variants.derived)]
    tied = [name for name in unknown if name in variants.tied]
    undeclared = _undeclared_mtp(variants, unknown, known)
    notes = [f"{name}: left out, it equals {variants.tied[name]} as tie_word_embeddings says." for name in tied]
    if derived:
        notes.append(f"{_counted(derived)}: left out, the values follow from config.json.")
    if undeclared:
        notes.append(
            f"{_counted(undeclared)}: left out, an MTP layer that config.json does not declare. To keep it, set "
            "num_nextn_predict_layers there."
        )
    return Unlisted(tuple(notes), tuple(sorted(set(unknown) - {*derived, *tied, *undeclared})))


def shared_copies(arch: ModelArch, names: Collection[str]) -> dict[str, str]:
    """Copies that MTP layers leave out -> the tensor of the main model that stands for each. An MTP layer of which
    nothing is there stays absent."""
    mtp = [spec for spec in arch.tensors() if spec.role is Role.MTP]
    present = {spec.layer for spec in mtp if spec.name in names}
    lacking = {spec.name for spec in mtp if spec.layer in present and spec.name not in names}
    copies = arch.variants().copies
    return {name: original for name, original in copies.items() if name in lacking and original in names}


def unfounded_mtp(arch: ModelArch, names: Collection[str]) -> str:
    """A line about a layer that config.json counts as an MTP layer, and that has nothing in the source of what makes it
    one: it is one of the decoder's. "" if there is none; a layer of which nothing is there is absent."""
    present: dict[int, list[str]] = {}
    for spec in arch.tensors():
        if spec.role is Role.MTP and spec.layer is not None and spec.name in names:
            present.setdefault(spec.layer, []).append(spec.name)
    own = arch.variants().mtp_own
    for layer, found in present.items():
        if own and not any(name.endswith(own) for name in found):
            needed = ", ".join(ending.removeprefix(".").removesuffix(".weight") for ending in own)
            return (
                f"num_hidden_layers is {arch.n_layers}, which makes layer {layer} the MTP layer, but in the source it "
                f"has none of {needed}, which such a layer needs."
            )
    return ""


def note_of_copies(shared: Mapping[str, str]) -> tuple[str, ...]:
    """A line for each of `shared_copies`."""
    return tuple(f"{name}: not in the source, taken from {original}." for name, original in shared.items())


def contradicts_tied(
    variants: CheckpointVariants, names: Collection[str], equal: Callable[[str, str], bool]
) -> tuple[str, str] | None:
    """A head beside tied embeddings that is not the embedding, byte for byte, and the line about it."""
    for name, original in variants.tied.items():
        if name in names and original in names and not equal(name, original):
            line = f"{name} differs from {original}, but config.json says that the embeddings are tied."
            return name, line
    return None


def _undeclared_mtp(variants: CheckpointVariants, unknown: Collection[str], known: Collection[str]) -> tuple[str, ...]:
    """Tensors of whole layers beyond those that config.json counts, each with what only MTP layers have."""
    marker = variants.mtp_marker
    layers = {name.removesuffix(marker) + "." for name in unknown if marker and name.endswith(marker)}
    extra = tuple(layer for layer in layers if not any(name.startswith(layer) for name in known))
    return tuple(name for name in unknown if extra and name.startswith(extra))


def _unexpected_hint(name: str, variants: CheckpointVariants) -> str:
    for pattern, architecture in variants.foreign.items():
        if fnmatchcase(name, pattern):
            return f"Such tensors belong to {architecture}, which quantkit does not know."
    return "If it is a whole extra layer, compare num_hidden_layers and num_nextn_predict_layers in config.json."


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _counted(names: list[str] | tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{len(names):,} tensors such as {names[0]}"
