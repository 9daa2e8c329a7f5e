"""The types of each family under each mix are those that llama-quantize gives, by llama.cpp's own
`llama_model_quantize`."""

from __future__ import annotations

import ctypes as c
import os
from pathlib import Path
from typing import Any

import pytest

from quantkit.arch import arch_of
from quantkit.formats.gguf.reader import GgufReader
from quantkit.plan.recipe import Recipe
from quantkit.plan.target_gguf import GgufTarget
from quantkit.runtimes.llama_cpp.presets import FILE_TYPES, NEED_IMPORTANCE, PRESETS
from tests.arch.grouped import GROUPED
from tests.convert.jobs import run, write_model
from tests.oracles.llama_cpp import SPARE_BYTES, library

REFUSED = {
    "Q2_K_S",
    *(name for name, mix in PRESETS.items() if {mix.default, mix.query, mix.embed} & {*NEED_IMPORTANCE}),
}
"""Mixes that llama-quantize does not make without an importance matrix."""
WIDE = {"hidden_size": 256, "intermediate_size": 320, "vocab_size": 512, "num_hidden_layers": 9}
CASES: dict[str, dict[str, Any]] = {
    **{name: config(**WIDE) for name, config in GROUPED.items()},
    "one key for four queries": GROUPED["qwen3_moe"](**WIDE, num_key_value_heads=1, num_experts=4),
}


class QuantizeParams(c.Structure):
    """The begin of struct llama_model_quantize_params, and room for the rest."""

    _fields_ = (("nthread", c.c_int32), ("ftype", c.c_int32), ("rest", c.c_uint8 * SPARE_BYTES))


def quantizer() -> Any:
    """A library with the function; the calling test is skipped without one."""
    path = os.environ.get("QUANTKIT_LIBLLAMA")
    call = c.CDLL(path) if path else library().call
    if not hasattr(call, "llama_model_quantize"):
        pytest.skip("this build of llama.cpp does not export llama_model_quantize (QUANTKIT_LIBLLAMA)")
    call.llama_backend_init()
    return call


def by_llama_quantize(source: Path, out: Path, preset: str) -> dict[str, str]:
    """Types of all tensors, by name."""
    call = quantizer()
    call.llama_model_quantize_default_params.restype = QuantizeParams
    call.llama_model_quantize.restype = c.c_uint32
    call.llama_model_quantize.argtypes = [c.c_char_p, c.c_char_p, c.POINTER(QuantizeParams)]
    params = call.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES[preset], 1
    assert call.llama_model_quantize(str(source).encode(), str(out).encode(), c.byref(params)) == 0
    with GgufReader(out) as found:
        return {name: entry.kind for name, entry in found.tensors.items()}


def by_plan(config: dict[str, Any], preset: str) -> dict[str, str]:
    """The same as a plan decides it."""
    recipe = Recipe.from_dict(
        {"version": 1, "outputs": [{"name": "main", "format": "gguf", "preset": preset, "mtp": "keep"}]}
    )
    arch = arch_of(config)
    (output,) = recipe.outputs
    target = GgufTarget(output, recipe, arch, tuple(arch.tensors()))  # pyright: ignore[reportArgumentType]
    types = dict.fromkeys(arch.gguf().constants(), "F32")
    for spec in target.specs:
        rule = target.preset_rule(spec)
        assert rule is not None
        kind = rule.keep.upper() if rule.keep is not None else rule.scheme.type  # pyright: ignore
        types[arch.gguf().stored_name(spec.name)[0]] = kind
    return types


@pytest.mark.parametrize("case", CASES)
def test_types_are_llama_quantize_s(case: str, tmp_path: Path) -> None:
    quantizer()
    config = CASES[case]
    write_model(tmp_path / "source", config)
    plain = {"version": 1, "outputs": [{"name": "f32", "format": "gguf", "preset": "F32", "mtp": "keep"}]}
    run(tmp_path / "source", Recipe.from_dict(plain), tmp_path / "out")
    (source,) = (tmp_path / "out").rglob("*.gguf")
    for preset, mix in PRESETS.items():
        if preset in REFUSED or mix.default in ("F32", "F16", "BF16"):
            continue
        found = by_llama_quantize(source, tmp_path / "quantised.gguf", preset)
        planned = by_plan(config, preset)
        assert {name: kind for name, kind in found.items() if planned.get(name) != kind} == {}, preset
