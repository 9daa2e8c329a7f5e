"""Each way in which a checkpoint is known to load silently wrong, or not at all, is named: a sound one is broken in
just this way. Observed in vLLM 0.24 and 0.33, transformers 5.23 and compressed-tensors 0.20."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import quantkit
from quantkit.errors import QuantkitError
from tests.convert.jobs import LINEARS, int4, recipe_of, run, write_model
from tests.verify.breaking import (
    ATTENTION,
    EXPERT,
    Config,
    Tensors,
    add,
    broken,
    cast,
    drop,
    faults,
    group,
    ignored,
    key,
    narrowed,
    own_group,
    rename,
    section,
    stated,
    weights,
    without,
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All linears int4 in groups of 64, the MTP layer dropped."""
    folder = tmp_path_factory.mktemp("verify")
    write_model(folder / "model")
    run(folder / "model", recipe_of({"match": "role:mtp", "drop": True}, int4(kind="rtn"), tokens=None), folder / "out")
    return folder / "out"


TRAPS: dict[str, tuple[Callable[[Tensors, Config], None], str]] = {
    "a tensor of one expert is missing": (
        drop(f"{EXPERT}.up_proj.weight_packed"),
        f"missing: {EXPERT}.up_proj.weight_packed",
    ),
    "a scale is missing": (drop(f"{ATTENTION}.o_proj.weight_scale"), f"missing: {ATTENTION}.o_proj.weight_scale"),
    "a linear is missing": (
        drop(*(f"{ATTENTION}.o_proj.weight_{part}" for part in ("packed", "scale", "shape"))),
        f"missing: {ATTENTION}.o_proj.weight_packed, {ATTENTION}.o_proj.weight_scale.",
    ),
    "the router's bias is missing": (
        drop("model.layers.1.mlp.gate.e_score_correction_bias"),
        "missing: model.layers.1.mlp.gate.e_score_correction_bias",
    ),
    "a norm is missing": (drop(f"{ATTENTION}.kv_a_layernorm.weight"), f"missing: {ATTENTION}.kv_a_layernorm.weight"),
    "a name is misspelt": (
        rename("model.norm.weight", "model.final_norm.weight"),
        "not of this architecture: model.final_norm.weight",
    ),
    "codes are stored in another integer": (
        cast(f"{ATTENTION}.o_proj.weight_packed", torch.int64),
        f"of another dtype: {ATTENTION}.o_proj.weight_packed is I64, needed I32",
    ),
    "scales are too small and are copied in part": (
        narrowed(f"{EXPERT}.gate_proj.weight_scale"),
        f"of another shape: {EXPERT}.gate_proj.weight_scale is [128, 1], needed [128, 2]",
    ),
    "g_idx of an older format": (
        add(f"{ATTENTION}.o_proj.weight_g_idx", torch.zeros(128, dtype=torch.int32)),
        f"not of this architecture: {ATTENTION}.o_proj.weight_g_idx",
    ),
    "an expert of other bits": (own_group(f"{EXPERT}.up_proj", num_bits=8), "experts of a layer need one scheme"),
    "an expert of another group size": (
        own_group(f"{EXPERT}.up_proj", group_size=32),
        "experts of a layer need one scheme",
    ),
    "an expert with zero points": (
        own_group(f"{EXPERT}.up_proj", symmetric=False),
        "experts of a layer need one scheme",
    ),
    "an expert that is not quantised": (ignored(f"{EXPERT}.up_proj"), "experts of a layer need one scheme"),
    "half of a fused attention input": (
        ignored(f"{ATTENTION}.kv_a_proj_with_mqa"),
        "vLLM joins them into fused_qkv_a_proj",
    ),
    "half of a shared expert": (
        own_group("model.layers.1.mlp.shared_experts.up_proj", num_bits=8),
        "vLLM joins them into gate_up_proj",
    ),
    "a quantised router": (
        lambda tensors, config: quantised_router(tensors, config),
        "vLLM reads it only unquantised",
    ),
    "a pattern that takes the embedding": (
        lambda tensors, config: group(config)["targets"].append("re:.*embed.*"),
        "model.embed_tokens: a target of config.json matches it",
    ),
    "a linear that config.json calls quantised is not": (
        lambda tensors, config: plain_linear(tensors, f"{ATTENTION}.o_proj"),
        f"{ATTENTION}.o_proj.weight is stored unquantised, by config.json it is int4 g64",
    ),
    "a linear that config.json calls plain is packed": (
        lambda tensors, config: section(config)["ignore"].append(f"{ATTENTION}.o_proj"),
        f"{ATTENTION}.o_proj.weight is stored quantised, by config.json it is not",
    ),
    "no scoring_func": (without("scoring_func"), "config.json: scoring_func is missing"),
    "no topk_method": (without("topk_method"), "config.json: topk_method is missing"),
    "another quant_method": (stated("quant_method", "quark"), "'quark', whose load contract is not known"),
    "a section that is stale": (without("quantization_config"), "is stored quantised, by config.json it is not"),
    "the sizes of another model": (key("moe_intermediate_size", 256), "of another shape: "),
    "a pattern that is none": (stated("ignore", ["re:*"]), "a target or ignore pattern is malformed"),
    "per row without a number": (
        lambda tensors, config: group(config)["weights"].update(strategy="channel", group_size=None),
        "group_size null ends vLLM 0.24 with a TypeError",
    ),
    "an MTP layer that config.json does not count": (
        lambda tensors, config: (
            config.update(num_nextn_predict_layers=0),
            tensors.update({"model.layers.2.eh_proj.weight": torch.zeros(128, 256)}),
        ),
        "num_nextn_predict_layers is 0 and an MTP layer is stored",
    ),
    "part of an MTP layer": (
        lambda tensors, config: (
            config.update(num_nextn_predict_layers=1),
            tensors.update({"model.layers.2.eh_proj.weight": torch.zeros(128, 256)}),
        ),
        "missing: model.layers.2.",
    ),
    "sparsity_config": (stated("sparsity_config", {"format": "dense"}), "sparsity_config: vLLM 0.33 refuses it"),
    "act-order by group": (weights("actorder", "group"), "actorder 'group' is refused"),
    "other bits than are stored": (weights("num_bits", 8), "of another shape: "),
    "another group size than is stored": (weights("group_size", 32), "of another shape: "),
    "zero points that are not stored": (weights("symmetric", False), "weight_zero_point"),
}


def plain_linear(tensors: Tensors, module: str) -> None:
    shape = tensors[f"{module}.weight_shape"].tolist()
    for part in ("packed", "scale", "shape"):
        del tensors[f"{module}.weight_{part}"]
    tensors[f"{module}.weight"] = torch.zeros(shape, dtype=torch.bfloat16)


def quantised_router(tensors: Tensors, config: Config) -> None:
    section(config)["ignore"] = ["lm_head"]
    n_experts, hidden = tensors.pop("model.layers.1.mlp.gate.weight").shape
    tensors["model.layers.1.mlp.gate.weight_packed"] = torch.zeros(n_experts, hidden // 8, dtype=torch.int32)
    tensors["model.layers.1.mlp.gate.weight_scale"] = torch.ones(n_experts, hidden // 64, dtype=torch.bfloat16)
    tensors["model.layers.1.mlp.gate.weight_shape"] = torch.tensor([n_experts, hidden])


def test_a_sound_checkpoint_has_no_fault(sound: Path, tmp_path: Path) -> None:
    assert faults(sound) == faults(sound, "transformers") == faults(sound, "sglang") == ""
    assert faults(broken(sound, tmp_path / "same", lambda tensors, config: None)) == ""


@pytest.mark.parametrize("name", TRAPS)
def test_every_trap_is_named(name: str, sound: Path, tmp_path: Path) -> None:
    change, said = TRAPS[name]
    assert said in faults(broken(sound, tmp_path / "broken", change))


def test_a_head_that_is_not_ignored_is_a_fault_in_transformers_only(sound: Path, tmp_path: Path) -> None:
    folder = broken(sound, tmp_path / "broken", lambda tensors, config: section(config)["ignore"].remove("lm_head"))
    text = faults(folder, "transformers")
    assert "lm_head: a target of config.json takes it" in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tensor_parallel": 3}, "over 3 GPUs: 4 attention heads are not divisible by 3"),
        ({"tensor_parallel": 4}, "128 inputs over 4 ranks are no multiple of group_size 64"),
        ({"pipeline_parallel": 3}, "over 3 GPUs: there are 2 layers"),
        ({"tensor_parallel": 2, "pipeline_parallel": 2}, ""),
    ],
)
def test_a_model_that_cannot_be_cut_so_is_named(options: dict[str, int], said: str, sound: Path) -> None:
    text = faults(sound, **options)
    assert said in text
    assert bool(text) == bool(said)


def test_bytes_that_changed_and_shards_of_another_job_are_named(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(sound, folder)
    shard = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (folder / "model-old.safetensors").write_bytes(b"")
    (folder / "tokenizer.json").unlink()
    text = faults(folder)
    assert f"{shard.name}: its sha256 is " in text
    assert "tokenizer.json: is missing." in text
    assert "model-old.safetensors: is not of this conversion" in text
    assert "sha256" not in faults(folder, hashes=False)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b"])
def test_names_that_lead_out_of_the_folder_are_not_followed(name: str, sound: Path, tmp_path: Path) -> None:
    """quantkit.json may come from a stranger."""
    folder = tmp_path / "made"
    shutil.copytree(sound, folder)
    (tmp_path / "secret").write_text("text")
    document = json.loads((folder / "quantkit.json").read_text())
    document["sha256"][name] = "0" * 64
    (folder / "quantkit.json").write_text(json.dumps(document))
    assert faults(folder) == f": quantkit.json lists {name}, which is no file of this folder."


def test_experts_that_changed_places_are_found_beside_the_original(sound: Path, tmp_path: Path) -> None:
    """Every header is right."""

    def swap(tensors: Tensors, config: Config) -> None:
        for part in ("packed", "scale"):
            for projection in ("gate", "up", "down"):
                one, other = (f"model.layers.1.mlp.experts.{e}.{projection}_proj.weight_{part}" for e in (0, 1))
                tensors[one], tensors[other] = tensors[other], tensors[one]

    folder = broken(sound, tmp_path / "swapped", swap)
    source = sound.parent / "model"
    assert faults(folder, sample=1000) == ""
    lines = faults(folder, sample=1000, source=source).splitlines()
    assert len(lines) == 6
    assert all("of its norm away from the original's" in line for line in lines)
    found = quantkit.verify(sound, sample=1000, source=source)
    assert found.passed
    assert found.contents.compared == found.contents.decoded > 20


def test_values_that_are_no_numbers_are_found(sound: Path, tmp_path: Path) -> None:
    def blank(tensors: Tensors, config: Config) -> None:
        tensors[f"{ATTENTION}.o_proj.weight_scale"][:] = 0
        tensors[f"{ATTENTION}.q_b_proj.weight_scale"][0, 0] = float("nan")

    text = faults(broken(sound, tmp_path / "blank", blank), sample=1000)
    assert f"{ATTENTION}.o_proj.weight: 128 of 128 rows decode to zeros" in text
    assert f"{ATTENTION}.q_b_proj.weight" in text


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        ("generation_config.json", "{", "is not sound JSON"),
    ],
)
def test_side_files_that_no_runtime_can_read_are_named(
    name: str, content: str, said: str, sound: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(sound, folder)
    (folder / name).write_text(content)
    assert said in faults(folder, hashes=False)


def test_notes_say_what_is_missing_around_the_weights(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(sound, folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    texts = [finding.text for finding in quantkit.verify(folder, hashes=False, sample=0).notes]
    assert any(text.startswith("no chat template") for text in texts)
    assert any(text.startswith("eos_token_id: config.json 1, generation_config.json [1, 2]") for text in texts)
    assert any("none is stored: speculative decoding by MTP is refused" in text for text in texts)


@pytest.mark.parametrize(("runtime", "fault"), [("vllm", True), ("sglang", True), ("transformers", False)])
def test_what_serves_text_refuses_to_start_without_a_tokenizer(
    runtime: str, fault: bool, sound: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(sound, folder)
    (folder / "tokenizer.json").unlink()
    found = quantkit.verify(folder, runtimes=runtime, hashes=False, sample=0)
    (finding,) = (finding for finding in found.findings if "no tokenizer files" in finding.text)
    assert (finding.fault, finding.runtime) == (fault, runtime if fault else "")


def test_a_conversion_of_weights_alone_is_no_fault(tmp_path: Path) -> None:
    """It was warned of before the work."""
    write_model(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    report = run(tmp_path / "model", recipe_of(tokens=None), tmp_path / "out")
    assert report.outputs[0].faults == ()
    assert not quantkit.verify(tmp_path / "out", sample=0).passed


def test_a_runtime_that_does_not_read_the_format_is_refused(sound: Path) -> None:
    with pytest.raises(QuantkitError, match=r"llama\.cpp does not read it; runtimes that read it: vllm, transformers"):
        quantkit.verify(sound, runtimes="llama.cpp")
    with pytest.raises(QuantkitError, match="runtime vLLM: not known"):
        quantkit.verify(sound, runtimes="vLLM")


def test_an_fp8_checkpoint_is_held_against_its_blocks(tmp_path: Path) -> None:
    write_model(tmp_path / "model", fp8=True)
    assert faults(tmp_path / "model") == ""
    folder = broken(tmp_path / "model", tmp_path / "broken", drop(f"{EXPERT}.up_proj.weight_scale_inv"))
    assert f"missing: {EXPERT}.up_proj.weight_scale_inv." in faults(folder)


# --- NVFP4 and bitsandbytes -----------------------------------------------------------------------------------------


def test_global_scales_of_joined_linears_that_differ_are_named(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    rule = {"match": LINEARS, "scheme": {"kind": "nvfp4"}, "method": {"kind": "rtn"}}
    run(tmp_path / "model", recipe_of({"match": "role:mtp", "drop": True}, rule, tokens=None), tmp_path / "out")
    assert faults(tmp_path / "out", sample=1000, source=tmp_path / "model") == ""

    def double(tensors: Tensors, config: Config) -> None:
        tensors[f"{EXPERT}.up_proj.weight_global_scale"] *= 2

    text = faults(broken(tmp_path / "out", tmp_path / "broken", double))
    assert f"{EXPERT}.up_proj.weight_global_scale: differ, but vLLM joins these linears" in text


def test_what_nvfp4_inputs_are_divided_by_belongs_to_each_linear(tmp_path: Path) -> None:
    """As llm-compressor writes its preset NVFP4: the weights are those of NVFP4A16."""
    write_model(tmp_path / "model")
    rule = {"match": LINEARS, "scheme": {"kind": "nvfp4"}, "method": {"kind": "rtn"}}
    run(tmp_path / "model", recipe_of({"match": "role:mtp", "drop": True}, rule, tokens=None), tmp_path / "out")
    missing = f"{EXPERT}.up_proj.input_global_scale"

    def four_bit_inputs(tensors: Tensors, config: Config) -> None:
        group(config)["input_activations"] = {**group(config)["weights"], "dynamic": "local"}
        names = [name for name in tensors if name.endswith(".weight_global_scale")]
        tensors |= {name.replace("weight_global", "input_global"): torch.ones(1) for name in names}

    def but_one(tensors: Tensors, config: Config) -> None:
        four_bit_inputs(tensors, config)
        del tensors[missing]

    whole = broken(tmp_path / "out", tmp_path / "whole", four_bit_inputs)
    assert faults(whole, sample=1000, source=tmp_path / "model") == ""
    assert quantkit.inspect(whole).unusual == quantkit.inspect(tmp_path / "out").unusual
    assert f"missing: {missing}." in faults(broken(tmp_path / "out", tmp_path / "but-one", but_one))


def test_codes_that_are_not_packed_are_named(sound: Path, tmp_path: Path) -> None:
    """compressed-tensors 0.20 writes so where integers have FP8 inputs and no format is given."""

    def unpacked(tensors: Tensors, config: Config) -> None:
        for name in [name for name in tensors if name.endswith(".weight_packed")]:
            words = tensors.pop(name)
            tensors[name.removesuffix("_packed")] = torch.zeros(len(words), 8 * words.shape[1], dtype=torch.int8)
            del tensors[name.replace("_packed", "_shape")]

    text = faults(broken(sound, tmp_path / "broken", unpacked))
    assert (
        "model.layers.0.self_attn.q_a_proj.weight is stored as I8, a number for each weight, by config.json it is int4"
        in text
    )
    assert "missing" not in text


def test_what_is_stored_wider_than_it_was_is_a_note(sound: Path, tmp_path: Path) -> None:
    def widened(tensors: Tensors, config: Config) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].float()

    found = quantkit.verify(broken(sound, tmp_path / "wide", widened), sample=0)
    assert found.passed
    (text,) = (finding.text for finding in found.notes if "lm_head" in finding.text)
    assert text == "float32 here and 16 bits in the official release: lm_head.weight. They take twice the space."


def test_bitsandbytes_must_load_in_transformers(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    rules = [
        {"match": "role:mtp", "drop": True},
        {"match": "role:attention|mlp", "scheme": {"kind": "bnb4"}, "method": {"kind": "rtn"}},
    ]
    recipe = recipe_of(*rules, tokens=None)
    output = recipe.outputs[0].model_copy(update={"format": "bitsandbytes"})
    report = run(tmp_path / "model", recipe.model_copy(update={"outputs": (output,)}), tmp_path / "out")
    assert report.outputs[0].faults == ()
    found = quantkit.verify(tmp_path / "out", source=tmp_path / "model")
    assert found.passed
    assert "vLLM 0.33 does not read it" in faults(tmp_path / "out", "vllm")
    text = faults(
        broken(tmp_path / "out", tmp_path / "broken", drop(f"{ATTENTION}.o_proj.weight.nested_absmax")), "transformers"
    )
    assert f"missing: {ATTENTION}.o_proj.weight.nested_absmax" in text


# --- GPTQ and AWQ -----------------------------------------------------------------------------------------------------
