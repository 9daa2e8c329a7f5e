"""Finished checkpoints that are damaged, incomplete or stored in other ways are refused by one line; other tools' are
read."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file

from quantkit.errors import SourceError
from quantkit.formats.folder import FolderSource
from quantkit.formats.layouts.compressed_tensors import COMPRESSED_TENSORS
from quantkit.schemes import IntScheme

SECTION: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "strategy": "group",
                "group_size": 32,
                "symmetric": True,
                "observer": "minmax",
                "observer_kwargs": {},
            },
        }
    },
}


def tensors() -> dict[str, torch.Tensor]:
    codes = torch.randint(-8, 8, (40, 64), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    return {
        "a.weight_packed": pack_to_int32(codes, 4),
        "a.weight_scale": torch.linspace(-1, 1, 80).view(40, 2).to(torch.bfloat16),
        "a.weight_shape": torch.tensor([40, 64]),
        "norm.weight": torch.ones(64, dtype=torch.bfloat16),
    }


def write(directory: Path, section: dict[str, Any], stored: dict[str, torch.Tensor]) -> Path:
    save_file(stored, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"quantization_config": section}))
    return directory


def test_a_checkpoint_of_another_tool(tmp_path: Path) -> None:
    stored = tensors()
    source = FolderSource(write(tmp_path, SECTION, stored), COMPRESSED_TENSORS.reader)
    assert set(source.infos()) == {"a.weight", "norm.weight"}
    assert source.scheme("a.weight") == IntScheme(group_size=32)
    assert source.scheme("norm.weight") is None
    codes = torch.randint(-8, 8, (40, 64), generator=torch.Generator().manual_seed(0))
    expected = codes.view(40, 2, 32).float() * stored["a.weight_scale"].float()[:, :, None]
    assert torch.equal(source.read("a.weight"), expected.view(40, 64))
    assert torch.equal(source.read("norm.weight"), stored["norm.weight"])


def test_weight_shape_is_not_needed_for_groups(tmp_path: Path) -> None:
    stored = tensors()
    del stored["a.weight_shape"]
    assert FolderSource(write(tmp_path, SECTION, stored), COMPRESSED_TENSORS.reader).infos()["a.weight"].shape == (
        40,
        64,
    )


def test_channels_of_odd_width_need_weight_shape(tmp_path: Path) -> None:
    section = copy.deepcopy(SECTION)
    section["config_groups"]["group_0"]["weights"].update(strategy="channel", group_size=None, num_bits=3)
    codes = torch.randint(-4, 4, (8, 61), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    stored = {
        "a.weight_packed": pack_to_int32(codes, 3),
        "a.weight_scale": torch.ones(8, 1, dtype=torch.float16),
        "a.weight_shape": torch.tensor([8, 61]),
    }
    assert torch.equal(
        FolderSource(write(tmp_path, section, stored), COMPRESSED_TENSORS.reader).read("a.weight"), codes.float()
    )


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]

FAULTS: dict[str, tuple[Change, str]] = {
    "no section": (lambda section, _: section.clear(), "quantization_config is None, an object was needed"),
    "gptq": (lambda section, _: section.update(quant_method="gptq"), "quant_method is 'gptq'"),
    "no groups": (lambda section, _: section.pop("config_groups"), "config_groups is None, an object was needed"),
    "floats of six bits": (
        lambda section, _: section["config_groups"]["group_0"]["weights"].update(type="float", num_bits=6),
        r"config_groups\.group_0: type 'float', num_bits 6, strategy 'group', group_size 32 cannot be read",
    ),
    "targets": (
        lambda section, _: section["config_groups"]["group_0"].update(targets=7),
        "needs a list of texts, found 7",
    ),
    "pattern": (lambda section, _: section.update(ignore=["re:*"]), "pattern is malformed"),
    "ignored but packed": (
        lambda section, _: section.update(ignore=["a"]),
        r"a\.weight is packed, but .* gives it no scheme of packed codes",
    ),
    "other bits": (
        lambda section, _: section["config_groups"]["group_0"]["weights"].update(num_bits=8),
        r"weight_packed is I32 \[40, 8\], needed I32 \[40, 16\]",
    ),
    "no scale": (lambda _, stored: stored.pop("a.weight_scale"), "weight_packed has no weight_scale beside it"),
    "integer scale": (
        lambda _, stored: stored.update({"a.weight_scale": torch.ones(40, 2).int()}),
        "a matrix of floats was needed",
    ),
    "no zero point": (
        lambda section, _: section["config_groups"]["group_0"]["weights"].update(symmetric=False),
        r"weight_zero_point is missing, needed I32 \[5, 2\]",
    ),
    "g_idx": (
        lambda _, stored: stored.update({"a.weight_g_idx": torch.zeros(64).int()}),
        r"weight_g_idx: this way of storing a linear",
    ),
    "bare codes": (
        lambda _, stored: stored.update({"b.weight": torch.ones(4, 4).to(torch.int8)}),
        r"b\.weight is I8 without a weight_scale",
    ),
    "codes with scale": (
        lambda _, stored: stored.update(
            {"b.weight": torch.ones(4, 4).to(torch.int8), "b.weight_scale": torch.ones(4, 1)}
        ),
        r"b\.weight is I8 with a weight_scale, but",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_read_exactly_is_refused(fault: str, tmp_path: Path) -> None:
    change, message = FAULTS[fault]
    section, stored = copy.deepcopy(SECTION), tensors()
    change(section, stored)
    with pytest.raises(SourceError, match=message) as caught:
        FolderSource(write(tmp_path, section, stored), COMPRESSED_TENSORS.reader)
    assert "\n" not in caught.value.message


def test_an_unquantised_folder_is_refused(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match="quantization_config is None, an object was needed"):
        FolderSource(tmp_path, COMPRESSED_TENSORS.reader)
