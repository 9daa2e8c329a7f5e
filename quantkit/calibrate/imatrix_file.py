"""What an imatrix file of llama.cpp says about the inputs of linears, in place of calibration text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.arch.base import ModelArch
from quantkit.arch.parts import in_parts, stored_tensors
from quantkit.errors import SourceError
from quantkit.formats.preallocated import sha256_of
from quantkit.tensors import TensorSpec

if TYPE_CHECKING:
    import torch

    from quantkit.calibrate.inputs import InputImportance
    from quantkit.formats.gguf.imatrix import Imatrix


LATEST = 3
"""Tensors kept: a batch of experts asks for gate, up and down in turn."""


@dataclass(slots=True)
class ImportanceFile:
    """An open imatrix and the model's names in it. An open resource: `close` it.

    ``missing``: GGUF names of weights that it does not have (see `lacks`).
    """

    imatrix: Imatrix
    specs: dict[str, TensorSpec]
    arch: ModelArch
    missing: frozenset[str]
    _latest: dict[str, InputImportance | None] = field(default_factory=dict[str, "InputImportance | None"])

    @classmethod
    def open(cls, path: Path, arch: ModelArch) -> ImportanceFile:
        """Raises `SourceError` if it is no imatrix, damaged, or of another model."""
        from quantkit.formats.gguf.imatrix import Imatrix

        if not path.is_file():
            raise SourceError(
                f"{path}: no such imatrix file.",
                hint="imatrix: is a path relative to the recipe's folder.",
            )
        specs = _linears(arch)
        imatrix = Imatrix.open(path)
        try:
            missing = imatrix.check(_sizes(arch, specs))
        except BaseException:
            imatrix.close()
            raise
        return cls(imatrix, specs, arch, frozenset(missing))

    @property
    def sha256(self) -> str:
        """sha256 of the file, in hex."""
        return sha256_of(self.imatrix.path)

    def lacks(self, name: str) -> bool:
        """Whether a linear of a decoder layer is quantised as without importance: the file does not have it, or has
        only its parts."""
        return name not in self.specs or self.arch.gguf().stored_name(name)[0] in self.missing

    def of(self, names: tuple[str, ...], device: torch.device) -> InputImportance | None:
        """Mean squares of the inputs of linears of one shape: (B, in) on the device, B experts, or the heads of one
        part. None where the file says nothing. Raises `SourceError` for values that are negative or not finite."""
        import torch

        from quantkit.calibrate.inputs import InputImportance

        found = [self._one(name) for name in names]
        known = [row for row in found if row is not None]
        if len(known) < len(names):
            return None
        importance = torch.cat([row.importance for row in known]).to(device)
        return InputImportance(importance, tuple(n for row in known for n in row.n_tokens))

    def close(self) -> None:
        """Close the file."""
        self.imatrix.close()

    def _one(self, name: str) -> InputImportance | None:
        from quantkit.calibrate.inputs import InputImportance

        spec = self.specs.get(name)
        if spec is None:
            return None
        stored, expert = self.arch.gguf().stored_name(name)
        whole = self._stored(stored, spec.shape[0] if len(spec.shape) == 3 else None)
        if whole is None or expert is None:
            return whole
        return InputImportance(whole.importance[expert : expert + 1], (whole.n_tokens[expert],))

    def _stored(self, stored: str, heads: int | None) -> InputImportance | None:
        """All experts or heads of one GGUF tensor. The latest are kept, because experts are asked for one by one."""
        import torch

        from quantkit.calibrate.inputs import InputImportance

        if stored not in self._latest:
            if len(self._latest) == LATEST:
                del self._latest[next(iter(self._latest))]
            found = self.imatrix.of(stored, heads)
            inputs = None if found is None else InputImportance(torch.from_numpy(found[0]), tuple(found[1].tolist()))
            self._latest[stored] = inputs
        return self._latest[stored]


def _linears(arch: ModelArch) -> dict[str, TensorSpec]:
    """Linears by the names that GGUF stores, those with parts by these. MTP layers are among them: llama.cpp's own
    imatrix files lack those, quantkit's have them where the layer was calibrated."""
    return {spec.name: spec for spec in in_parts(arch) if spec.linear}


def _sizes(arch: ModelArch, specs: dict[str, TensorSpec]) -> dict[str, tuple[int, int]]:
    """GGUF name -> number of matrices, in_features."""
    stored = stored_tensors(specs.values(), arch.gguf())
    return {name: (tensor.n_matrices, tensor.shape[-1]) for name, tensor in stored.items()}
