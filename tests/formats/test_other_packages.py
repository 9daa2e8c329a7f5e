"""GPTQ, AWQ and bitsandbytes linears, packed by those packages, decode to what they decode to themselves.

tools/golden_formats.py made the files. gptqmodel and AutoAWQ compute scale * (code - zero) in float16, this reader the
same exactly: rounded to float16 every value must be theirs, bit for bit. bitsandbytes computes in float32: the same
bits without rounding.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantkit.errors import SourceError
from quantkit.formats.folder import FolderSource
from quantkit.formats.layouts import READERS

GOLDEN = Path(__file__).parent / "golden"
KINDS = ("gptq", "awq", "bitsandbytes")
MODULE = "model.layers.1.mlp.experts.3.gate_proj"
NAME = f"{MODULE}.weight"
PLAIN = torch.arange(6).view(2, 3).to(torch.bfloat16)


def cases() -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for kind in KINDS:
        with safe_open(GOLDEN / f"{kind}.safetensors", "pt") as file:
            found += [(kind, case) for case in file.metadata()]
    return found


def golden(kind: str, case: str) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """quantization_config, the module's stored tensors, and their decoding."""
    with safe_open(GOLDEN / f"{kind}.safetensors", "pt") as file:
        section = json.loads(file.metadata()[case])
        names = [name for name in file.keys() if name.startswith(f"{case}.")]  # noqa: SIM118 (not a dict)
        stored = {name.removeprefix(f"{case}."): file.get_tensor(name) for name in names}
    return section, stored, stored.pop("decoded")


def write(folder: Path, section: dict[str, Any], stored: dict[str, Tensor]) -> Path:
    tensors = {f"{MODULE}.{name}": tensor.contiguous() for name, tensor in stored.items()}
    save_file({**tensors, "model.norm.weight": PLAIN}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": section}))
    return folder


@pytest.mark.parametrize(("kind", "case"), cases())
def test_decoded_as_by_its_own_package(kind: str, case: str, tmp_path: Path) -> None:
    section, stored, decoded = golden(kind, case)
    with FolderSource(write(tmp_path, section, stored), READERS[kind]) as source:
        assert set(source.infos()) == {NAME, "model.norm.weight"}
        info = source.infos()[NAME]
        weight = source.read(NAME)
        assert (info.dtype, info.shape, weight.dtype) == ("F32", tuple(decoded.shape), torch.float32)
        assert torch.equal(weight.to(decoded.dtype), decoded)
        assert decoded.float().unique().numel() > 8
        assert torch.equal(source.read("model.norm.weight"), PLAIN)
        assert torch.equal(source.read(NAME, (5, 14)), weight[5:14])
        assert source.read(NAME, (7, 7)).shape == (0, weight.shape[1])
        assert torch.equal(source.read_rows(NAME, [13, 2, 2, 9]), weight[[13, 2, 2, 9]])
        assert source.read_rows(NAME, []).shape == (0, weight.shape[1])
        assert torch.equal(torch.cat(list(source.chunks(NAME, 5 * 4 * weight.shape[1]))), weight)
        source.prefetch([NAME, "model.norm.weight"])


def test_groups_follow_from_the_config_of_a_module_of_its_own(tmp_path: Path) -> None:
    """gptqmodel's "dynamic" rules give modules other bits and groups than the config's."""
    section, stored, decoded = golden("gptq", "w8_g32_sym_gptq")
    section.update(bits=4, group_size=128, dynamic={"+:.*gate_proj": {"bits": 8, "group_size": 32}})
    with FolderSource(write(tmp_path, section, stored), READERS["gptq"]) as source:
        assert torch.equal(source.read(NAME).half(), decoded)


@pytest.mark.parametrize("case", ["w3_g32_sym_gptq", "w4_g96_sym_gptq"])
def test_g_idx_may_be_absent(case: str, tmp_path: Path) -> None:
    section, stored, decoded = golden("gptq", case)
    del stored["g_idx"]
    with FolderSource(write(tmp_path, section, stored), READERS["gptq"]) as source:
        assert torch.equal(source.read(NAME).half(), decoded)


# ---------------------------------------------------------------------------------------------------------- refusals

Damage = Callable[[dict[str, Any], dict[str, Tensor]], Any]
W4 = "w4_g32_sym_gptq"


def state(**changes: Any) -> Damage:
    """Change entries of a bitsandbytes state."""

    def change(section: dict[str, Any], stored: dict[str, Tensor]) -> None:
        name = next(name for name in stored if "quant_state" in name)
        entries = {**json.loads(bytes(stored[name].tolist())), **changes}
        stored[name] = torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)

    return change


REFUSED: list[tuple[str, str, str, Damage]] = [
    ("gptq", W4, "checkpoint_format is 'marlin'", lambda c, t: c.update(checkpoint_format="marlin")),
    ("gptq", W4, "checkpoint_format is 'marlin'", lambda c, t: c.update(is_marlin_format=True)),
    ("gptq", W4, "checkpoint_format is \\[\\]", lambda c, t: c.update(checkpoint_format=[])),
    ("gptq", W4, "bits is 5", lambda c, t: c.update(bits=5)),
    ("gptq", W4, "bits is None", lambda c, t: c.pop("bits")),
    ("gptq", W4, "bits is '4'", lambda c, t: c.update(bits="4")),
    ("gptq", W4, "12 rows of words, 24 were needed for 96 inputs of 8 bits", lambda c, t: c.update(bits=8)),
    ("gptq", W4, "qzeros is missing", lambda c, t: t.pop("qzeros")),
    ("gptq", W4, "scales is missing", lambda c, t: t.pop("scales")),
    ("gptq", W4, "no tensor is named \\*.qweight", lambda c, t: t.clear()),
    ("gptq", W4, "qweight is I64", lambda c, t: t.update(qweight=t["qweight"].long())),
    ("gptq", W4, "qweight is I32 \\[384\\]", lambda c, t: t.update(qweight=t["qweight"].flatten())),
    ("gptq", W4, "scales is F16 \\[3, 31\\]", lambda c, t: t.update(scales=t["scales"][:, 1:])),
    ("gptq", W4, "scales is I32", lambda c, t: t.update(scales=t["scales"].int())),
    ("gptq", W4, "qzeros is I32 \\[2, 4\\]", lambda c, t: t.update(qzeros=t["qzeros"][1:])),
    ("gptq", W4, "names groups from 3 to 5, there are 3", lambda c, t: t["g_idx"].add_(3)),
    ("gptq", W4, "names groups from -1 to 1", lambda c, t: t["g_idx"].sub_(1)),
    ("gptq", W4, "12 rows of words, 0 were needed", lambda c, t: t.update(g_idx=t["g_idx"][:0])),
    ("gptq", W4, "stored packed and plain", lambda c, t: t.update(weight=torch.zeros(32, 96))),
    ("gptq", W4, "NaN or infinite", lambda c, t: t["scales"].fill_(torch.nan)),
    ("awq", "g32", "version is 'gemv'", lambda c, t: c.update(version="gemv")),
    ("awq", "g32", "version is 2", lambda c, t: c.update(version=2)),
    ("awq", "g32", "bits is 8", lambda c, t: c.update(bits=8)),
    ("awq", "g32", "qzeros is missing", lambda c, t: t.pop("qzeros")),
    ("awq", "g32", "no tensor is named", lambda c, t: t.clear()),
    ("awq", "g32", "qzeros is I32 \\[2, 4\\]", lambda c, t: t.update(qzeros=t["qzeros"][1:])),
    ("awq", "g32", "scales is F16 \\[3, 31\\]", lambda c, t: t.update(scales=t["scales"][:, 1:])),
    ("awq", "g32", "3 groups do not divide 95 inputs", lambda c, t: t.update(qweight=t["qweight"][1:])),
    ("bitsandbytes", "nf4_b64_k128", "load_in_4bit", lambda c, t: c.update(load_in_8bit=True)),
    ("bitsandbytes", "nf4_b64_k128", "storage is 'bfloat16'", lambda c, t: c.update(bnb_4bit_quant_storage="bfloat16")),
    ("bitsandbytes", "nf4_b64_k128", "no tensor is named", lambda c, t: t.clear()),
    ("bitsandbytes", "nf4_b64_k128", "quant_map is missing", lambda c, t: t.pop("weight.quant_map")),
    ("bitsandbytes", "nf4_b64_k128", "weight is missing", lambda c, t: t.pop("weight")),
    ("bitsandbytes", "nf4_b64_k128", "quant_type is 'int4'", state(quant_type="int4")),
    ("bitsandbytes", "nf4_b64_k128", "quant_type is 'fp4'", state(quant_type="fp4")),
    ("bitsandbytes", "nf4_b64_k128", "shape is \\[16, 127\\]", state(shape=[16, 127])),
    ("bitsandbytes", "nf4_b64_k128", "shape is None", state(shape=None)),
    ("bitsandbytes", "nf4_b64_k128", "weight is U8 \\[1024, 1\\], U8 \\[1088, 1\\]", state(shape=[17, 128])),
    ("bitsandbytes", "nf4_b64_k128", "blocksize is 0", state(blocksize=0)),
    ("bitsandbytes", "nf4_b64_k128", "blocksize is True", state(blocksize=True)),
    ("bitsandbytes", "nf4_b64_k128", "absmax is F32 \\[32\\], F32 \\[64\\]", state(blocksize=32)),
    ("bitsandbytes", "nf4_b64_k128_nested", "nested_offset is 'x'", state(nested_offset="x")),
    ("bitsandbytes", "nf4_b64_k128_nested", "nested_blocksize is None", state(nested_blocksize=None)),
    ("bitsandbytes", "nf4_b64_k128_nested", "nested_absmax is F32 \\[2\\]", state(nested_blocksize=64)),
    ("bitsandbytes", "nf4_b64_k128_nested", "absmax is U8", lambda c, t: t.pop("weight.nested_absmax")),
    (
        "bitsandbytes",
        "nf4_b64_k128",
        "not sound JSON",
        lambda c, t: t["weight.quant_state.bitsandbytes__nf4"].fill_(1),
    ),
    (
        "bitsandbytes",
        "nf4_b64_k128",
        "has 5,000 bytes",
        lambda c, t: t.update({"weight.quant_state.bitsandbytes__nf4": torch.zeros(5000, dtype=torch.uint8)}),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "case", "message", "damage"), REFUSED)
def test_refused_in_one_line(kind: str, case: str, message: str, damage: Damage, tmp_path: Path) -> None:
    section, stored, _ = golden(kind, case)
    damage(section, stored)
    with (
        pytest.raises(SourceError, match=message) as refused,
        FolderSource(write(tmp_path, section, stored), READERS[kind]) as source,
    ):
        source.read(NAME)
    assert "\n" not in str(refused.value)
