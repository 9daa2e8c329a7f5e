"""GGUF files that llama.cpp refuses, or computes wrongly without a word: each is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantkit
from quantkit.errors import QuantkitError
from tests.convert.gguf_jobs import gguf_output, gguf_recipe, wide_config
from tests.convert.jobs import run, write_model
from tests.inspect.gguf_files import Shapes, tiny_file, write_file

Keys = dict[str, Any]


def faults(path: Path) -> str:
    return "\n".join(finding.text for finding in quantkit.verify(path).faults)


def without(name: str) -> Callable[[Keys, Shapes], None]:
    def change(keys: Keys, shapes: Shapes) -> None:
        del keys[f"deepseek2.{name}"]

    return change


def key(name: str, value: Any) -> Callable[[Keys, Shapes], None]:
    def change(keys: Keys, shapes: Shapes) -> None:
        keys[f"deepseek2.{name}"] = value

    return change


TRAPS: dict[str, tuple[Callable[[Keys, Shapes], None], str]] = {
    "no gating function": (without("expert_gating_func"), "llama.cpp then takes softmax"),
    "yarn's factor ten times too large": (key("rope.scaling.yarn_log_multiplier", 1.0), "a tenth of mscale_all_dim"),
    "no yarn factor": (without("rope.scaling.yarn_log_multiplier"), "multiplies rotated queries and keys by"),
    "no rank of the queries": (without("attention.q_lora_rank"), "llama.cpp refuses the file"),
    "groups that do not divide the experts": (key("expert_group_count", 5), "which does not divide 12 experts"),
    "more groups used than there are": (key("expert_group_used_count", 4), "1 to 3 was needed"),
    "more experts used than there are": (key("expert_used_count", 13), "llama.cpp ends with an assertion"),
    "an expert stack is missing": (
        lambda keys, shapes: shapes.pop("blk.1.ffn_up_exps.weight") and None,
        "tensors of the architecture are missing: blk.1.ffn_up_exps.weight",
    ),
    "a name is misspelt": (
        lambda keys, shapes: shapes.update({"blk.1.exp_probs_b": shapes.pop("blk.1.exp_probs_b.bias")}),
        "tensors of the architecture are missing: blk.1.exp_probs_b.bias",
    ),
    "the sizes of another model": (key("expert_feed_forward_length", 64), "shape does not fit the metadata"),
}


def test_a_sound_file_has_no_fault(tmp_path: Path) -> None:
    path = write_file(tmp_path / "model.gguf", *tiny_file())
    assert faults(path) == ""
    assert quantkit.verify(tmp_path).passed


@pytest.mark.parametrize("name", TRAPS)
def test_every_trap_is_named(name: str, tmp_path: Path) -> None:
    change, said = TRAPS[name]
    keys, shapes = tiny_file()
    change(keys, shapes)
    assert said in faults(write_file(tmp_path / "model.gguf", keys, shapes))


def test_other_architectures_and_runtimes_are_refused(tmp_path: Path) -> None:
    path = write_file(tmp_path / "model.gguf", {}, {"a.weight": ((32, 32), "Q8_0")}, architecture="gemma3")
    with pytest.raises(QuantkitError, match="general.architecture is gemma3"):
        quantkit.verify(path)
    with pytest.raises(QuantkitError, match=r"vllm does not read it; runtimes that read it: llama\.cpp"):
        quantkit.verify(path, runtimes="vllm")


def test_what_only_costs_quality_is_a_note(tmp_path: Path) -> None:
    keys, shapes = tiny_file()
    shapes["blk.0.attn_k_b.weight"] = shapes["blk.0.attn_k_b.weight"][0], "MXFP4"
    found = quantkit.verify(write_file(tmp_path / "model.gguf", keys, shapes))
    assert found.passed
    assert any("takes them for experts" in note.text for note in found.notes)


def test_values_are_decoded_beside_the_original(tmp_path: Path) -> None:
    """Every header is right, and a part of the data is not."""
    model = tmp_path / "model"
    write_model(model, wide_config())
    recipe = gguf_recipe(gguf_output(preset="Q8_0"), tokens=None)
    report = run(model, recipe, tmp_path / "out")
    sound = quantkit.verify(report.outputs[0].path, source=model, sample=100)
    assert sound.passed
    assert sound.contents.compared > 5
    (file,) = report.outputs[0].path.glob("*.gguf")
    content = bytearray(file.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    file.write_bytes(content)
    found = quantkit.verify(report.outputs[0].path, source=model, sample=100, hashes=False)
    assert any("of its norm away from the original's" in fault.text for fault in found.faults)
    alone = quantkit.verify(report.outputs[0].path, hashes=False)
    assert any(note.text.startswith("values were not decoded") for note in alone.notes)
