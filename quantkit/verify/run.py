"""`verify_path`: what a runtime needs of a finished checkpoint, held against what lies on the disk.

Headers and config.json first, which takes seconds for DeepSeek V3; then, if wanted, every byte.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from quantkit.arch import arch_of
from quantkit.arch.base import ModelArch
from quantkit.errors import PlanError, SourceError
from quantkit.formats.safetensors.header import printable
from quantkit.formats.source import read_config
from quantkit.plan.pruning import pruned_view
from quantkit.verify import completeness, surroundings, transformers, vllm
from quantkit.verify.checkpoint import Checkpoint, open_checkpoint
from quantkit.verify.contents import hash_files, is_rescaled, pruning_of
from quantkit.verify.gguf import LLAMA_CPP, holds_gguf, read_gguf
from quantkit.verify.stated import BITSANDBYTES
from quantkit.verify.verification import ANY, RUNTIMES, Contents, Finding, Verification

VLLM, TRANSFORMERS, SGLANG = "vllm", "transformers", "sglang"


@dataclass(frozen=True, slots=True)
class Parallel:
    """Over how many GPUs a runtime cuts tensors, and layers."""

    tensor: int = 1
    pipeline: int = 1


@dataclass(frozen=True, slots=True)
class FolderContract:
    """What a runtime demands of a folder of safetensors beyond its being whole: one line for each fault, and for each
    thing that it takes otherwise than one may expect. ``needs_tokenizer``: whether it refuses to start without."""

    faults: Callable[[Checkpoint, Parallel], Iterable[str]]
    notes: Callable[[Checkpoint], Iterable[str]]
    needs_tokenizer: bool = True


_VLLM = FolderContract(lambda found, cut: vllm.faults(found, cut.tensor, cut.pipeline), vllm.notes)
CONTRACTS: Mapping[str, FolderContract] = {
    VLLM: _VLLM,
    TRANSFORMERS: FolderContract(
        lambda found, cut: transformers.faults(found), transformers.notes, needs_tokenizer=False
    ),
    SGLANG: FolderContract(_VLLM.faults, lambda found: ()),
}
"""By runtime. SGLang's loaders of these layouts began as vLLM's; none of it was tried there."""


@dataclass(frozen=True, slots=True)
class Scope:
    """``runtimes``: of `RUNTIMES`, () for those that read the format, of which only the one that serves it (vLLM;
    transformers for bitsandbytes) must load it; ``hashes``: whether every file is read and
    compared with quantkit.json; ``sample``: linears to be decoded; ``source``: the original's folder, or None;
    ``text``: whether text is to be served, without which a missing tokenizer is no fault."""

    runtimes: tuple[str, ...] = ()
    parallel: Parallel = Parallel()
    hashes: bool = True
    sample: int = 0
    source: Path | None = None
    text: bool = True


def verify_path(path: Path, scope: Scope) -> Verification:
    """A folder of safetensors, a GGUF file or a folder with one.

    A damaged or missing shard is a fault as others are. Raises `SourceError` for a folder that cannot be opened at all
    and for config.json or an index that is damaged, `ConfigError` for an architecture that is not known, `PlanError`
    for a runtime that does not read the format.
    """
    _check_path(path)
    if holds_gguf(path):
        return _verify_gguf(path, scope)
    runtimes = _chosen(path, scope.runtimes, tuple(CONTRACTS), (VLLM, TRANSFORMERS))
    with open_checkpoint(path) as found:
        findings: list[Finding] = []
        if found.method == BITSANDBYTES and not scope.runtimes:
            runtimes = (TRANSFORMERS,)
            findings.append(Finding(VLLM, False, vllm.BITSANDBYTES_UNREAD))
        required = scope.runtimes or runtimes[:1]
        findings += (*_of_all(found), *_of_tokenizer(found, runtimes, required if scope.text else ()))
        if scope.source is not None:
            findings += (Finding(ANY, False, text) for text in completeness.vision_notes(found, scope.source))
        if found.unreadable:
            findings.append(Finding(ANY, False, "without all shards, what runtimes demand of them is not checked."))
        else:
            findings += _of_runtimes(found, runtimes, required, scope.parallel)
        n_tensors, method, arch, unreadable = len(found.planned), found.method, found.arch, found.unreadable
    contents = _hashed(path, findings, unreadable) if scope.hashes else Contents()
    if scope.sample:
        contents = _sampled(path, arch, scope, contents, findings)
    return Verification(path, method, runtimes, n_tensors, tuple(findings), contents)


def _verify_gguf(path: Path, scope: Scope) -> Verification:
    runtimes = _chosen(path, scope.runtimes, (LLAMA_CPP,), (LLAMA_CPP,))
    try:
        faults, notes, n_tensors = read_gguf(path)
    except SourceError as error:
        faults, notes, n_tensors = (error.message,), (), None
    findings = [Finding(LLAMA_CPP, True, text) for text in faults]
    findings += [Finding(LLAMA_CPP, False, text) for text in notes]
    folder = path if path.is_dir() else path.parent
    contents = _hashed(folder, findings, ()) if scope.hashes else Contents()
    if scope.sample and scope.source is None:
        text = "values were not decoded: give the original's folder, which says what the tensors belong to."
        findings.append(Finding(ANY, False, text))
    elif scope.sample and scope.source is not None:
        contents = _sampled(path, arch_of(read_config(scope.source)), scope, contents, findings)
    return Verification(path, "GGUF", runtimes, n_tensors, tuple(findings), contents)


def _chosen(
    path: Path, wanted: tuple[str, ...], possible: tuple[str, ...], default: tuple[str, ...]
) -> tuple[str, ...]:
    """The runtimes to be scope. Raises `PlanError` for one that does not read such files."""
    unknown = [name for name in wanted if name not in RUNTIMES]
    if unknown:
        raise PlanError(f"runtime {printable(unknown[0])}: not known.", hint=f"Known are {', '.join(RUNTIMES)}.")
    unfit = [name for name in wanted if name not in possible]
    if unfit:
        known = f"runtimes that read it: {', '.join(possible)}"
        raise PlanError(f"{path}: {printable(unfit[0])} does not read it; {known}.", hint="Leave out --runtime.")
    return wanted or default


def _check_path(path: Path) -> None:
    """Raise `SourceError` for a file that is only a part of a checkpoint, or that is not there."""
    if path.suffix == ".safetensors":
        raise SourceError(
            f"{path}: is one file of a checkpoint, its folder was needed.",
            hint=f"quantkit verify {shlex.quote(str(path.parent))}",
        )
    if path.suffix == ".gguf" and not path.exists():
        raise SourceError(f"{path}: no such file.", hint="Give a .gguf file that exists, or the folder of one.")


def _hashed(path: Path, findings: list[Finding], known: Container[str]) -> Contents:
    """``known``: files that have a fault already."""
    hashed = hash_files(path)
    findings += [Finding(ANY, True, text) for text in hashed.faults if text.partition(": ")[0] not in known]
    if not hashed.recorded:
        findings.append(Finding(ANY, False, "no quantkit.json with checksums: the bytes were not compared."))
    return Contents(hashed=hashed.files, hashed_bytes=hashed.nbytes)


def _sampled(path: Path, arch: ModelArch, scope: Scope, contents: Contents, findings: list[Finding]) -> Contents:
    """Linears are decoded only if nothing else is wrong."""
    from quantkit.verify.sample import decode_sample

    if any(finding.fault for finding in findings):
        return replace(contents, not_decoded=True)
    original, folder = scope.source, path if path.is_dir() else path.parent
    if original is not None and is_rescaled(folder):
        text = "the recipe rescales channels (awq), so linears are not those of the original: they were not compared."
        findings.append(Finding(ANY, False, text))
        original = None
    pruning, origins = pruning_of(folder), dict[str, str]()
    if pruning is not None and scope.source is not None:
        whole = arch_of(read_config(scope.source))
        arch = whole.with_experts(max(map(len, pruning.kept.values())))
        origins.update(pruned_view(whole, pruning.kept).origins)
    sampled = decode_sample(path, arch, scope.sample, original, origins)
    findings += [Finding(ANY, True, text) for text in sampled.faults]
    return replace(contents, decoded=sampled.decoded, compared=sampled.compared)


def _of_all(found: Checkpoint) -> Iterator[Finding]:
    for text in (*completeness.faults(found), *surroundings.faults(found.directory)):
        yield Finding(ANY, True, text)
    for text in (*completeness.notes(found), *surroundings.notes(found.directory, found.config)):
        yield Finding(ANY, False, text)


def _of_tokenizer(found: Checkpoint, runtimes: Iterable[str], required: Container[str]) -> Iterator[Finding]:
    """Weights alone load in transformers. What serves text refuses to start, unless it is told that tokens come in."""
    if surroundings.has_tokenizer(found.directory):
        return
    needing = [name for name in runtimes if CONTRACTS[name].needs_tokenizer]
    for name in needing:
        yield Finding(name, name in required, surroundings.NO_TOKENIZER_TO_START)
    if not needing:
        yield Finding(ANY, False, surroundings.NO_TOKENIZER)


def _of_runtimes(
    found: Checkpoint, runtimes: Iterable[str], required: Iterable[str], parallel: Parallel
) -> Iterator[Finding]:
    """What keeps a runtime from loading the folder is a fault only if that runtime is ``required``."""
    for name in runtimes:
        for text in CONTRACTS[name].faults(found, parallel):
            yield Finding(name, name in required, text)
        for text in CONTRACTS[name].notes(found):
            yield Finding(name, False, text)
