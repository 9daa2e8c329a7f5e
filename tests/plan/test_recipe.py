"""Recipe files: what is accepted, and that every fault is one line with file, line, key, found and needed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from quantkit.errors import QuantkitError, RecipeError
from quantkit.formats.layouts import LAYOUTS, READERS
from quantkit.plan.recipe import FolderOutput, Recipe
from quantkit.plan.recipe_file import model_of, parse_model, recipe_path, schema_of, shipped_recipes
from quantkit.plan.recipe_values import parse_size

GOOD = """\
version: 1
description: a test
calibration: {data: [builtin:mixed], tokens: 4096, sequence_length: 256, seed: 0}
propagate: quantized
outputs:
  - name: w4a16
    format: compressed-tensors
    rules:
      - {match: "role:router|norm|embed|lm_head|mtp", keep: source}
      - {match: "role:expert", scheme: {kind: int, bits: 4, group_size: 128}, method: {kind: gptq}}
      - {match: "*", scheme: {kind: int, bits: 8, group_size: null}, method: {kind: rtn, grid: 20}}
validation: {text: [builtin:eval], context: 512, max_perplexity_increase: 2%, max_mean_kl: 0.05}
"""


def faults(text: str) -> list[str]:
    """The lines of the error that ``text`` causes."""
    with pytest.raises(RecipeError) as caught:
        parse_model(Recipe, text, "r.yaml")
    return caught.value.message.splitlines()


def test_good_recipe() -> None:
    recipe = parse_model(Recipe, GOOD, "r.yaml")
    (output,) = recipe.outputs
    assert output.max_shard_bytes == 5_000_000_000
    assert [rule.scheme.bits if rule.scheme else None for rule in output.rules] == [None, 4, 8]
    assert recipe.validation is not None
    assert recipe.validation.max_perplexity_increase == pytest.approx(0.02)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("version: 1", "version: 2", "r.yaml:1: version: found 2, needed one of the allowed values (allowed: 1)."),
        (
            "bits: 4",
            "bitz: 4",
            "r.yaml:10: outputs[0].rules[1].scheme.bitz: found an unknown key, needed bits "
            "(allowed: kind, bits, group_size, symmetric, scale_dtype).",
        ),
        ("bits: 4", "bits: 9", "r.yaml:10: outputs[0].rules[1].scheme.bits: found 9, needed less than or equal to 8."),
        (
            "{kind: gptq}",
            "{kind: gtpq}",
            "r.yaml:10: outputs[0].rules[1].method: found 'gtpq', needed one of the allowed values "
            "(allowed: 'rtn', 'gptq', 'awq', 'repack') (did you mean gptq?).",
        ),
        (
            "grid: 20",
            "gird: 20",
            "r.yaml:11: outputs[0].rules[2].method.gird: found an unknown key, needed grid "
            "(allowed: kind, scale_search, grid, signed).",
        ),
        (
            "role:expert",
            "role:experts",
            "r.yaml:10: outputs[0].rules[1].match: found role 'experts', needed one of embed, norm, attention, mlp, "
            "expert, shared_expert, router, lm_head, mtp (did you mean expert?).",
        ),
        (
            "keep: source",
            "keep: bf61",
            "r.yaml:9: outputs[0].rules[0].keep: found 'bf61', needed one of the allowed values "
            "(allowed: 'source', 'bf16', 'f16' or 'f32') (did you mean bf16?).",
        ),
        (
            "keep: source",
            "keep: source, drop: true",
            "r.yaml:9: outputs[0].rules[0]: found keep and drop, needed exactly one of: keep, drop, or scheme "
            "(with or without method).",
        ),
        (
            "scheme: {kind: int, bits: 4, group_size: 128}",
            "scheme: Q4_M",
            "r.yaml:10: outputs[0].rules[1].scheme: found 'Q4_M', needed a mapping, or one of Q4_0, Q4_1, Q5_0, Q5_1, "
            "Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ2_XXS, IQ2_XS, IQ3_XXS, IQ1_S, IQ4_NL, IQ3_S, IQ2_S, IQ4_XS, IQ1_M, "
            "MXFP4, Q2_0 (did you mean Q4_K?).",
        ),
        ("tokens: 4096, ", "", "r.yaml:3: calibration.tokens: found nothing, needed this key."),
        (
            "2%",
            "two",
            "r.yaml:12: validation.max_perplexity_increase: found 'two', needed a percentage such as \"2%\" or a "
            "fraction such as 0.02.",
        ),
        (
            "format: compressed-tensors",
            "format: ggml",
            "r.yaml:6: outputs[0]: found 'ggml', needed one of the allowed values (allowed: "
            "'compressed-tensors', 'gptq', 'gptq_v2', 'awq', 'bitsandbytes', 'gguf') (did you mean gguf?).",
        ),
        (
            "format: compressed-tensors",
            "format: ggfu",
            "r.yaml:6: outputs[0]: found 'ggfu', needed one of the allowed values (allowed: "
            "'compressed-tensors', 'gptq', 'gptq_v2', 'awq', 'bitsandbytes', 'gguf') (did you mean gguf?).",
        ),
        (
            "name: w4a16",
            "name: ../w4a16",
            "r.yaml:6: outputs[0].name: found '../w4a16', needed string should match pattern "
            "'^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$'.",
        ),
        ("description: a test", "version: 1", "r.yaml:2: version: found the key twice (also line 1), needed it once."),
        ("description: a test", "description: [x]", "r.yaml:2: description: found a list, needed text."),
    ],
)
def test_one_fault_is_one_line(old: str, new: str, line: str) -> None:
    assert old in GOOD
    assert faults(GOOD.replace(old, new, 1)) == [line]


def test_all_faults_at_once_in_file_order() -> None:
    text = GOOD.replace("version: 1", "version: 3").replace("bits: 4", "bits: 1").replace("context: 512", "context: 1")
    assert [line.split(" ")[0] for line in faults(text)] == ["r.yaml:1:", "r.yaml:10:", "r.yaml:12:"]


def test_output_names_differ() -> None:
    document = (
        "version: 1\noutputs:\n"
        + 2 * '  - {name: a, format: compressed-tensors, rules: [{match: "*", keep: source}]}\n'
    )
    assert faults(document) == ["r.yaml:2: outputs: found two outputs named 'a', needed different names."]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "r.yaml:1: found an empty file"),
        ("- a\n", "r.yaml:1: found a list, needed a mapping"),
        ("version: [1\n", "is not sound YAML"),
        ("version: 1\n\tx: 2\n", "r.yaml:2: is not sound YAML"),
        ("a: &x [1]\nb: *x\n", "r.yaml:1: found a YAML anchor or alias"),
        ("outputs:\n  - {match: *.down_proj, keep: bf16}\n", "r.yaml:2: "),
        ("x: " + "[" * 500, "r.yaml:1: found more than 20 nested levels"),
        ("x: !!python/object/apply:os.system [ls]\n", "r.yaml:1: found a YAML tag, needed the plain value"),
        ('version: !!int ""\n', "r.yaml:1: found a YAML tag"),
        ("version: !!bool maybe\n", "r.yaml:1: found a YAML tag"),
        ("version: !!timestamp x\n", "r.yaml:1: found a YAML tag"),
        ("1: 2\n", "r.yaml:1: recipe: found a key that is not text"),
        ("? [a]\n: 2\n", "r.yaml:1: recipe: found a key that is not text"),
        ("version: \x00\n", "is not sound YAML"),
        ("a: 1\n---\nb: 2\n", "is not sound YAML"),
    ],
)
def test_hostile_or_broken_yaml(text: str, said: str) -> None:
    (line,) = faults(text)
    assert said in line


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("1" + ":1" * 30_000, "'1:1:1"),
        ("0x" + "F" * 5_000, "'0xFFF"),
        ("9" * 5_000, "'999"),
        ("2026-11-30", "'2026-11-30'"),
        ("017", "'017'"),
        ("no", "'no'"),
        ("-2", "-2"),
        ("1e3", "1000.0"),
        ("1.5", "1.5"),
        ("~", "null"),
    ],
)
def test_plain_values_are_those_of_json(value: str, found: str) -> None:
    assert any(f"r.yaml:1: version: found {found}" in line for line in faults(f"version: {value}\n"))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="is not a regular file"):
        Recipe.from_yaml(tmp_path / "r.yaml")


def test_glob_without_quotes_gets_a_hint() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_model(Recipe, "version: 1\nmatch: *x\n", "r.yaml")
    assert "quotes" in caught.value.hint


def test_many_faults_are_counted() -> None:
    lines = faults("version: 1\n" + "".join(f"key{i}: 1\n" for i in range(50)))
    assert len(lines) == 21
    assert lines[-1] == "... and 31 more faults."


def test_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none.yaml: no such file"):
        Recipe.from_yaml(tmp_path / "none.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * (2**16 + 1))
    with pytest.raises(RecipeError, match=r"found more than 65,536 bytes"):
        Recipe.from_yaml(tmp_path / "large.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"version: 1\ndescription: \xe9\n")
    with pytest.raises(RecipeError, match=r"latin.yaml:2: found bytes that are not UTF-8"):
        Recipe.from_yaml(tmp_path / "latin.yaml")
    with pytest.raises(RecipeError, match=r"cannot be read"):
        Recipe.from_yaml(tmp_path)
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert Recipe.from_yaml(tmp_path / "bom.yaml").version == 1


def test_shipped_recipes_load_by_name() -> None:
    names = [path.stem for path in shipped_recipes()]
    assert {"deepseek-v3-w4a16-gptq", "deepseek-v3-w4a16-all-int4", "deepseek-v3-w4a16-rtn", "nano-demo"} <= set(names)
    for name in names:
        assert Recipe.from_yaml(name).description
        first = recipe_path(name).read_text(encoding="utf-8").splitlines()[0]
        assert first == "# yaml-language-server: $schema=../docs/recipe.schema.json"
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml("nano-demmo")
    assert "nano-demo" in caught.value.hint


def test_recipes_name_every_layout_that_can_be_written() -> None:
    assert get_args(FolderOutput.model_fields["format"].annotation) == tuple(LAYOUTS)
    assert all(layout.reader in READERS.values() for layout in LAYOUTS.values())


def test_schema_names_every_key() -> None:
    schema = schema_of(Recipe)
    assert set(schema["properties"]) == set(Recipe.model_fields)
    percent = schema["$defs"]["Validation"]["properties"]["max_perplexity_increase"]
    assert {"type": "string"} in percent["anyOf"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("20GiB", 20 * 2**30), ("4096", 4096), ("1.5 MiB", 3 * 2**19), ("7kb", 7000), ("1TiB", 2**40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 XB", "-1GB", "1e3GB", "0", "٣GB", "5GB5", "nan"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="found"):
        parse_size(text)


class Round(BaseModel, extra="forbid"):
    """A member of a union that recipe files know nothing of."""

    kind: Literal["round"]
    step: int = 1


class Fold(BaseModel, extra="forbid"):
    """Another one."""

    kind: Literal["fold", "fold2"]
    ratio: float = 0.5


class Job(BaseModel, extra="forbid"):
    """A file of another model."""

    steps: tuple[Annotated[Round | Fold, Field(discriminator="kind")], ...]
    last: Annotated[Round | Fold, Field(discriminator="kind")] | None = None


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "steps: [{kind: fold2, ration: 1}]",
            "j.yaml:1: steps[0].ration: found an unknown key, needed ratio (allowed: kind, ratio).",
        ),
        (
            "steps: []\nlast: {kind: round, fold: 1}",
            "j.yaml:2: last.fold: found an unknown key, needed a known one (allowed: kind, step).",
        ),
        (
            "steps: [{step: 1}]",
            "j.yaml:1: steps[0]: found no key 'kind', needed it (allowed: 'round', 'fold', 'fold2').",
        ),
        (
            "steps: [{kind: flod}]",
            "j.yaml:1: steps[0]: found 'flod', needed one of the allowed values (allowed: 'round', 'fold', 'fold2') "
            "(did you mean fold?).",
        ),
        ("stepz: []", "j.yaml:1: stepz: found an unknown key, needed steps (allowed: steps, last)."),
    ],
)
def test_faults_follow_from_the_model_alone(text: str, line: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_model(Job, text, "j.yaml")
    assert line in caught.value.message.splitlines()
    with pytest.raises(RecipeError) as caught:
        model_of(Job, yaml.safe_load(text))
    assert line.partition(": ")[2] in caught.value.message.splitlines()


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=8)
keys = st.sampled_from(["version", "outputs", "rules", "match", "keep", "scheme", "method", "kind", "validation"])
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys | st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(values)
def test_any_document_gives_a_recipe_or_lines(value: Any) -> None:
    """JSON is YAML: whatever a file holds, the answer is a recipe or one line for each fault."""
    message = ""
    try:
        parse_model(Recipe, json.dumps(value), "r.yaml")
    except QuantkitError as error:
        message = error.message
    assert all(line.startswith(("r.yaml:", "... and ")) for line in message.splitlines())


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("deepseek-v3-w4a16", "deepseek-v3-w4a16-gptq"),
        ("deepseek-v3-w4a16-rtm", "deepseek-v3-w4a16-rtn"),
        ("deepseek-v3", "deepseek-v3-w4a16-gptq"),
    ],
)
def test_a_wrong_name_leads_to_a_calibrated_recipe(name: str, first: str) -> None:
    with pytest.raises(RecipeError) as refused:
        Recipe.from_yaml(name)
    assert refused.value.hint.startswith(f"Did you mean {first}")


@pytest.mark.parametrize(("text", "tokens"), [("16k", 16000), ("512Ki", 524288), ("1e5", 100000), ("4096", 4096)])
def test_tokens_are_written_as_the_option_takes_them(text: str, tokens: int, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    calibration = f"calibration: {{data: [a.txt], tokens: {text}, sequence_length: 64}}\n"
    path.write_text(f"version: 1\n{calibration}outputs:\n  - {{name: q, format: gguf, preset: Q4_K_M}}\n")
    found = Recipe.from_yaml(path)
    assert found.calibration is not None
    assert found.calibration.tokens == tokens
    path.write_text(path.read_text().replace(text, "many"))
    with pytest.raises(RecipeError, match=r"r\.yaml:2: calibration\.tokens: found 'many', needed a number such as"):
        Recipe.from_yaml(path)
