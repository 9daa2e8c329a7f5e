"""What `FolderSource` does for every reader: several linears in one stored tensor, other tensors beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quantkit.errors import SourceError
from quantkit.formats.folder import FolderReader, FolderSource, PackedLinear, Rows, by_runs
from quantkit.formats.safetensors.reader import SafetensorsSource
from quantkit.tensors import TensorInfo

STACK = torch.arange(3 * 4 * 8, dtype=torch.int8).view(3, 4, 8)
NORM = torch.ones(8, dtype=torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Expert:
    """One of the matrices of a stacked tensor."""

    info: TensorInfo
    number: int
    parts: tuple[str, ...] = ("experts.codes",)
    scheme: None = None

    def decode(self, raw: SafetensorsSource, rows: Rows) -> Tensor:
        """See `PackedLinear`."""
        (codes,) = raw.read(self.parts[0], (self.number, self.number + 1))
        return by_runs(rows, self.info.shape[1], lambda start, stop: codes[start:stop].float())


def find(raw: SafetensorsSource, section: Mapping[str, object]) -> Mapping[str, PackedLinear]:
    n_experts, n_out, n_in = raw.infos()["experts.codes"].shape
    names = [f"experts.{number}.weight" for number in range(n_experts)]
    return {name: Expert(TensorInfo(name, (n_out, n_in), "F32"), number) for number, name in enumerate(names)}


STACKED = FolderReader("stacked", find)


def write(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file(dict(tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "stacked"}}))
    return folder


def test_linears_may_share_a_stored_tensor(tmp_path: Path) -> None:
    with FolderSource(write(tmp_path, {"experts.codes": STACK, "norm.weight": NORM}), STACKED) as source:
        assert set(source.infos()) == {"norm.weight", *(f"experts.{number}.weight" for number in range(3))}
        for number in range(3):
            name = f"experts.{number}.weight"
            assert torch.equal(source.read(name), STACK[number].float())
            assert torch.equal(source.read(name, (1, 3)), STACK[number, 1:3].float())
            assert torch.equal(source.read_rows(name, [3, 0, 3]), STACK[number, [3, 0, 3]].float())
            assert source.read(name, (2, 2)).shape == source.read_rows(name, []).shape == (0, 8)
        assert torch.equal(source.read("norm.weight"), NORM)
        assert torch.equal(source.read_rows("norm.weight", [1, 1]), NORM[[1, 1]])
        assert source.scheme("norm.weight") is None
        source.prefetch(list(source.infos()))


def test_what_no_linear_takes_must_mean_what_it_holds(tmp_path: Path) -> None:
    extra = {"lm_head.weight": torch.ones(4, 8, dtype=torch.int8), "positions": torch.ones(4, dtype=torch.int64)}
    with FolderSource(write(tmp_path, {"experts.codes": STACK, **extra}), STACKED) as source:
        assert torch.equal(source.read("positions"), extra["positions"])
        with pytest.raises(SourceError, match=r"lm_head\.weight is I8, neither packed by the checkpoint's"):
            source.read("lm_head.weight")


def test_a_linear_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    tensors = {"experts.codes": STACK, "experts.1.weight": torch.ones(4, 8)}
    with pytest.raises(SourceError, match=r"experts\.1\.weight is stored packed and plain"):
        FolderSource(write(tmp_path, tensors), STACKED)
