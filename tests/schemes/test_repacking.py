"""Codes and scales of one scheme in another: the same float32 values, to the bit, by quantkit and by gguf-py."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from quantkit.errors import SchemeError
from quantkit.schemes import Float8Scheme, GgmlScheme, IntScheme, Mxfp4Scheme, Nvfp4Scheme, Scheme
from quantkit.schemes.repacking import block_type, check_scale, repacked, repacks

OUT, IN = 6, 256


def integers(bits: int, scheme: IntScheme, seed: int = 0) -> dict[str, Tensor]:
    """Random codes, every code at least once; scales of both signs in the scheme's dtype."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (OUT, IN), generator=generator, dtype=torch.uint8)
    codes[0, : min(2**bits, IN)] = torch.arange(min(2**bits, IN), dtype=torch.uint8)
    scale = torch.randn(OUT, scheme.n_groups(IN), generator=generator) / 50
    return {"codes": codes, "scale": scale.to(getattr(torch, scheme.scale_dtype))}


def bits_of(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32)


def by_gguf(blocks: Tensor, kind: str) -> Tensor:
    return torch.from_numpy(gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind]))


@pytest.mark.parametrize("group_size", [32, 64, 128, None], ids=str)
@pytest.mark.parametrize(("bits", "kind"), [(4, "Q4_0"), (5, "Q5_0"), (8, "Q8_0")])
def test_integers_become_blocks(bits: int, kind: str, group_size: int | None) -> None:
    source = IntScheme(bits=bits, group_size=group_size)
    target, stored = GgmlScheme.model_validate({"type": kind}), integers(bits, source)
    assert (block_type(source), repacks(source, target)) == (kind, True)
    blocks = repacked(source, target, stored)["blocks"]
    weight = source.decode(**stored)
    assert torch.equal(bits_of(target.decode(blocks)), bits_of(weight))
    assert torch.equal(bits_of(by_gguf(blocks, kind)), bits_of(weight))


def test_the_bytes_of_q4_0() -> None:
    """ggml's block of 32: a float16, then byte j with code j low and code j + 16 high."""
    source = IntScheme(bits=4, group_size=32)
    stored = integers(4, source)
    blocks = repacked(source, GgmlScheme(type="Q4_0"), stored)["blocks"].numpy().reshape(OUT, IN // 32, 18)
    codes = stored["codes"].numpy().reshape(OUT, IN // 32, 32)
    assert np.array_equal(blocks[..., 2:], codes[..., :16] | codes[..., 16:] << 4)
    assert np.array_equal(blocks[..., :2].copy().view(np.float16)[..., 0], stored["scale"].half().numpy())


def test_mxfp4_becomes_ggmls() -> None:
    """Every exponent with every code, minus zero included."""
    source, target = Mxfp4Scheme(), GgmlScheme(type="MXFP4")
    codes = torch.arange(255 * 32).remainder(16).to(torch.uint8).view(255, 32)
    stored = {"codes": codes, "scale": torch.arange(255, dtype=torch.uint8).view(255, 1)}
    assert repacks(source, target)
    blocks = repacked(source, target, stored)["blocks"]
    assert torch.equal(blocks[:, 0], stored["scale"][:, 0])
    assert torch.equal(blocks[:, 1:], codes[:, :16] | codes[:, 16:] << 4)
    weight = source.decode(**stored)
    assert torch.equal(bits_of(target.decode(blocks)), bits_of(weight))
    # gguf-py has no minus zero, and multiplies where 2**127 * 6 is infinite; it is compared as numbers.
    with np.errstate(over="ignore"):
        theirs = by_gguf(blocks, "MXFP4")
    assert torch.equal(theirs, weight)


def test_mxfp4_agrees_with_the_standard() -> None:
    """OCP Microscaling: e2m1 times 2**(exponent - 127), from the bits of the standard."""
    stored = {"codes": torch.arange(32, dtype=torch.uint8).remainder(16).view(1, 32), "scale": torch.tensor([[130]])}
    stored["scale"] = stored["scale"].to(torch.uint8)
    expected: list[float] = []
    for code in range(16):
        exponent, mantissa = code >> 1 & 3, code & 1
        magnitude = (1 + mantissa / 2) * 2 ** (exponent - 1) if exponent else mantissa / 2
        expected.append((-1) ** (code >> 3) * magnitude * 2.0**3)
    assert Mxfp4Scheme().decode(**stored)[0].tolist() == expected * 2


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (IntScheme(bits=4, group_size=128), IntScheme(bits=4, group_size=32)),
        (IntScheme(bits=4, group_size=None), IntScheme(bits=4, group_size=64)),
        (IntScheme(bits=4, group_size=32), IntScheme(bits=4, group_size=32, scale_dtype="float16")),
        (IntScheme(bits=3, group_size=64), IntScheme(bits=3, group_size=64, scale_dtype="float32")),
    ],
    ids=str,
)
def test_integers_in_other_groups(source: IntScheme, target: IntScheme) -> None:
    stored = integers(source.bits, source)
    made = repacked(source, target, stored)
    assert made["scale"].shape == (OUT, target.n_groups(IN))
    assert str(made["scale"].dtype) == f"torch.{target.scale_dtype}"
    assert torch.equal(bits_of(target.decode(**made)), bits_of(source.decode(**stored)))


def test_the_same_scheme_is_left_alone() -> None:
    scheme = IntScheme(bits=4, group_size=32, symmetric=False)
    stored = {**integers(4, scheme), "zero_point": torch.zeros(OUT, 8, dtype=torch.uint8)}
    assert repacks(scheme, scheme)
    assert repacked(scheme, scheme, stored) is stored


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (IntScheme(bits=4, group_size=32, symmetric=False), GgmlScheme(type="Q4_0")),
        (IntScheme(bits=4, group_size=32, symmetric=False), GgmlScheme(type="Q4_1")),
        (IntScheme(bits=4, group_size=16), GgmlScheme(type="Q4_0")),
        (IntScheme(bits=4, group_size=48), GgmlScheme(type="Q4_0")),
        (IntScheme(bits=3, group_size=32), GgmlScheme(type="Q4_0")),
        (IntScheme(bits=4, group_size=32), GgmlScheme(type="Q4_K")),
        (IntScheme(bits=4, group_size=32), GgmlScheme(type="Q8_0")),
        (Nvfp4Scheme(), GgmlScheme(type="MXFP4")),
        (Float8Scheme(), GgmlScheme(type="Q8_0")),
        (Mxfp4Scheme(), GgmlScheme(type="Q4_0")),
        (Mxfp4Scheme(), IntScheme(bits=4, group_size=32)),
        (IntScheme(bits=4, group_size=32), IntScheme(bits=8, group_size=32)),
        (IntScheme(bits=4, group_size=32), IntScheme(bits=4, group_size=64)),
        (IntScheme(bits=4, group_size=32), IntScheme(bits=4, group_size=None)),
        (IntScheme(bits=4, group_size=32), IntScheme(bits=4, group_size=32, symmetric=False)),
    ],
    ids=str,
)
def test_what_would_round_is_no_repack(source: Scheme, target: Scheme) -> None:
    assert not repacks(source, target)


SMALLEST_EXACT = 2.0**-17 * (1 + 127 / 128)
"""Below the normal float16, but all eight bits of the bfloat16 are still there."""


@pytest.mark.parametrize(
    ("value", "fits"),
    [(65280.0, True), (65536.0, False), (SMALLEST_EXACT, True), (SMALLEST_EXACT / 2, False), (2.0**-24, True),
     (2.0**-25, False), (0.0, True), (-0.01, True)],
)  # fmt: skip
def test_a_scale_that_is_no_float16_is_refused(value: float, fits: bool) -> None:
    source, target = IntScheme(bits=4, group_size=32), GgmlScheme(type="Q4_0")
    stored: dict[str, Any] = integers(4, source)
    stored["scale"][2, 3] = value
    if fits:
        weight = target.decode(**repacked(source, target, stored))
        assert torch.equal(bits_of(weight), bits_of(source.decode(**stored)))
        return
    with pytest.raises(SchemeError, match=r"^1 of 48 scales are not a number in float16 exactly, such as "):
        check_scale(source, target, stored["scale"])
    with pytest.raises(SchemeError, match="in float16 exactly"):
        repacked(source, target, stored)


def test_an_exponent_that_is_no_number_is_refused() -> None:
    scale = torch.full((2, 4), 127, dtype=torch.uint8)
    check_scale(Mxfp4Scheme(), GgmlScheme(type="MXFP4"), scale)
    scale[1, 2] = 255
    with pytest.raises(SchemeError, match=r"^1 of 8 scales are not the exponent of a number exactly, such as 255"):
        check_scale(Mxfp4Scheme(), GgmlScheme(type="MXFP4"), scale)
