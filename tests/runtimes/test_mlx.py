"""int4 in groups of 32 is what most runtimes read, and all that MLX reads of compressed-tensors: plans say both."""

from __future__ import annotations

import pytest

from quantkit.runtimes import int4_g32, mlx
from quantkit.schemes import Bnb4Scheme, IntScheme, Nvfp4Scheme, Scheme
from tests.formats.test_compressed_tensors_config import INT4, INT8, V3, is_expert, plan
from tests.tiny_models import tiny_config

LAYOUT = "compressed-tensors"
G32 = IntScheme(group_size=32)


def test_experts_of_kimi_k2_are_read_by_all() -> None:
    planned = plan(V3, lambda spec: G32 if is_expert(spec) else None)
    assert mlx.notes(planned, LAYOUT) == []
    (line,) = int4_g32.notes(planned, LAYOUT)
    assert line.startswith("model.layers.3.mlp.experts.0.gate_proj and 45,311 more (int4 g32): vLLM (Marlin, Humming, ")
    assert line.endswith(", SGLang, ktransformers (RAWINT4) and MLX read this.")


def test_mlx_is_not_named_where_it_cannot_read_the_rest() -> None:
    planned = plan(V3, lambda spec: G32 if is_expert(spec) else INT8)
    (line,) = int4_g32.notes(planned, LAYOUT)
    assert line.endswith(", SGLang and ktransformers (RAWINT4) read this.")
    (line,) = mlx.notes(planned, LAYOUT)
    assert "q_a_proj" in line
    assert "(int8 g128): of compressed-tensors mlx-lm 0.32 reads int4 g32 alone" in line


@pytest.mark.parametrize(
    "scheme",
    [INT4, IntScheme(group_size=None), IntScheme(bits=3, group_size=32), IntScheme(group_size=32, symmetric=False)],
)
def test_mlx_reads_no_other_integers(scheme: IntScheme) -> None:
    planned = plan(tiny_config(), lambda spec: scheme)
    assert len(mlx.notes(planned, LAYOUT)) == 1
    assert int4_g32.notes(planned, LAYOUT) == []


@pytest.mark.parametrize(("scheme", "read"), [(G32, True), (INT4, False), (Nvfp4Scheme(), False)])
def test_what_mlx_reads(scheme: Scheme, read: bool) -> None:
    assert mlx.reads(scheme) == read


def test_other_layouts() -> None:
    planned = plan(tiny_config(), lambda spec: INT4)
    assert mlx.notes(planned, "gptq") == []
    assert int4_g32.notes(plan(tiny_config(), lambda spec: G32), "gptq") == []
    assert "does not read bitsandbytes" in mlx.notes(plan(tiny_config(), lambda spec: Bnb4Scheme()), "bitsandbytes")[0]  # pyright: ignore[reportArgumentType]
