"""GGUF files as sources: blocks taken over into compressed-tensors and back, all else decoded as gguf-py does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor

from quantkit import plan, verify
from quantkit.arch import arch_of
from quantkit.convert import copying, dense, experts
from quantkit.errors import QuantkitError, SchemeError, SourceError
from quantkit.formats.model_source import ModelSource
from quantkit.plan.gguf_model import open_model
from quantkit.plan.headers import LEAST_ZEROS
from quantkit.plan.packed import packed_tables
from quantkit.plan.recipe import Recipe
from quantkit.plan.shorthand import Shorthand, shorthand_recipe
from quantkit.schemes import GgmlScheme, IntScheme, Mxfp4Scheme
from quantkit.tensors import Role
from tests.arch.relatives import deepseek_v2, deepseek_v32, glm4_moe_lite, glm_moe_dsa, kimi_k25
from tests.convert.gguf_jobs import RTN, gguf_output, gguf_recipe, stored_bytes, wide_config
from tests.convert.jobs import decoded, files_of, recipe_of, run, shards_of, write_model, write_text
from tests.convert.test_relatives import SMALL, VISION
from tests.convert.test_relatives_gguf import written
from tests.convert.test_repack import DROP, EXPERTS, KEPT, REPACK, SCHEMES, repack_rule, same_bits, stored
from tests.formats.test_compressed_tensors import loaded_logits
from tests.oracles import gguf_writer
from tests.oracles.gguf_reader import read_weights
from tests.tiny_models import write_shards

EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"
STACKED = "blk.1.ffn_down_exps.weight"
BACK = {"int4": ("Q4_0", "repack-q4_0-vllm"), "mxfp4": ("MXFP4", "repack-mxfp4-vllm")}
"""Name of a compressed-tensors source -> the type of its experts in GGUF, and the recipe that takes them back."""
FLOAT16 = {"kind": "int", "bits": 4, "group_size": 32, "scale_dtype": "float16"}
MIXED = [
    {"match": EXPERTS, "scheme": "Q4_0", "method": RTN},
    {"match": "*.o_proj.weight", "scheme": "Q6_K", "method": RTN},
    {"match": "role:attention|mlp|shared_expert", "scheme": "Q8_0", "method": RTN},
    {"match": "role:embed", "scheme": "Q5_0", "method": RTN},
    KEPT,
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """ "model" in BF16, "int4" and "mxfp4" (experts so, compressed-tensors), and each of them as GGUF; "mixed": of many
    types, with scales that bfloat16 does not hold."""
    root = tmp_path_factory.mktemp("gguf")
    write_model(root / "model", wide_config())
    write_text(root / "calibration.txt")
    write_text(root / "eval.txt", 300)
    run(root / "model", gguf_recipe(gguf_output(KEPT)), root / "model-gguf")
    run(root / "model", gguf_recipe(gguf_output(*MIXED)), root / "mixed")
    for name, (kind, _) in BACK.items():
        rule = {"match": EXPERTS, "scheme": SCHEMES[name], "method": RTN}
        run(root / "model", recipe_of(rule, DROP, tokens=None), root / name)
        run(root / name, gguf_recipe(gguf_output(repack_rule(kind), KEPT)), root / f"{name}-gguf")
    yield root
    shutil.rmtree(root)


def file_in(folder: Path) -> Path:
    (path,) = folder.glob("*.gguf")
    return path


def back(source: Path, config: Path, recipe: Recipe | str, out: Path) -> Path:
    loaded = Recipe.from_yaml(recipe) if isinstance(recipe, str) else recipe
    run(source, loaded, out, config=config)
    return out


def theirs(path: Path) -> dict[str, Tensor]:
    """What gguf-py makes of a file; zeros of MXFP4 have no sign there."""
    return read_weights(path)


# --------------------------------------------------------------------------------------------------------------- repack


@pytest.mark.parametrize("name", BACK)
def test_experts_come_back_as_the_same_bytes(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """compressed-tensors -> GGUF -> compressed-tensors; nothing is quantised on the way."""

    def refuse(*_: object) -> None:
        raise AssertionError("a repack computes nothing")

    for module, function in ((dense, "quantize_group"), (experts, "quantize_experts"), (copying, "_quantize_rows")):
        monkeypatch.setattr(module, function, refuse)
    out = back(file_in(place / f"{name}-gguf"), place / name, BACK[name][1], place / f"{name}-back")
    before, after = stored(place / name), stored(out)
    assert before.keys() == after.keys()
    for tensor, value in before.items():
        assert torch.equal(value.float(), after[tensor].float()), tensor
        assert value.dtype == after[tensor].dtype or after[tensor].dtype == torch.float32, tensor  # norms, routers
    weights, original = decoded(out), decoded(place / name)
    assert all(same_bits(weight, weights[tensor]) for tensor, weight in original.items())
    sections = [json.loads((folder / "config.json").read_text()) for folder in (place / name, out)]
    assert sections[0] == sections[1]
    assert (out / "tokenizer.json").read_bytes() == (place / "model" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", BACK)
def test_compressed_tensors_decodes_what_gguf_py_does(name: str, place: Path) -> None:
    out = place / f"{name}-again"
    recipe = recipe_of({"match": EXPERTS, "scheme": SCHEMES[name], "method": REPACK}, DROP, tokens=None)
    back(place / f"{name}-gguf", place / name, recipe, out)
    section = QuantizationConfig.model_validate(json.loads((out / "config.json").read_text())["quantization_config"])
    group = section.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(CompressionFormat(group.format).value)
    tensors, expected = stored(out), theirs(file_in(place / f"{name}-gguf"))
    module = EXPERT.removesuffix(".weight")
    state = {key.removeprefix(f"{module}."): value for key, value in tensors.items() if key.startswith(f"{module}.")}
    if name == "int4":  # decoded in the scale's dtype; float32 is exact
        state["weight_scale"] = state["weight_scale"].float()
    weight = compressor.decompress(state, group)["weight"]
    assert torch.equal(weight.float(), expected[EXPERT].to(weight.dtype).float())


def test_scales_that_bfloat16_holds_not_stay_float16(place: Path, tmp_path: Path) -> None:
    """A foreign Q4_0 file: refused by name before the work with bfloat16 scales, exact with float16 ones."""
    rules = [DROP, {"match": "*.o_proj.weight", "keep": "f32"}, {"match": "role:embed", "keep": "f32"}]
    source = file_in(place / "mixed")
    wrong = recipe_of({"match": EXPERTS, "scheme": SCHEMES["int4"], "method": REPACK}, *rules, tokens=None)
    with pytest.raises(SchemeError, match=r"of 2,048 scales are not a number in bfloat16 exactly") as refused:
        back(source, place / "model", wrong, tmp_path / "out")
    assert refused.value.hint.startswith("scale_dtype: float16 in the scheme holds all scales of Q4_0")
    assert list(tmp_path.iterdir()) == []
    right = recipe_of({"match": EXPERTS, "scheme": FLOAT16, "method": REPACK}, *rules, tokens=None)
    out = back(source, place / "model", right, tmp_path / "out")
    assert stored(out)[f"{EXPERT}_scale"].dtype == torch.float16
    weights, expected = decoded(out), theirs(source)
    assert weights.keys() == expected.keys()
    assert all(same_bits(weight, weights[name]) for name, weight in expected.items())
    notes = plan(source, right, config=place / "model").plan.warnings
    assert any("float16 ones need --dtype float16" in note for note in notes)


def test_gguf_goes_to_gguf_block_by_block(place: Path, tmp_path: Path) -> None:
    """Types that only GGUF has are kept; Q4_0 and Q8_0, which have other forms, are named."""
    rules = [
        {"match": EXPERTS, "scheme": "Q4_0", "method": REPACK},
        {"match": "*.kv_b_proj.weight*", "keep": "source"},
        {"match": "*.o_proj.weight", "scheme": "Q6_K", "method": REPACK},
        {"match": "role:attention|mlp|shared_expert", "scheme": "Q8_0", "method": REPACK},
        {"match": "role:embed", "scheme": "Q5_0", "method": REPACK},
        KEPT,
    ]
    out = back(place / "mixed", place / "model", gguf_recipe(gguf_output(*rules)), tmp_path / "out")
    before, after = stored_bytes(place / "mixed"), stored_bytes(out)
    assert before.keys() == after.keys()
    same = [name for name in before if before[name] == after[name]]
    assert [name for name in before if name not in same] == [
        f"blk.{layer}.attn_{part}_b.weight" for layer in (0, 1) for part in "kv"
    ]
    weights = read_weights(file_in(out))
    assert all(same_bits(weight, weights[name]) for name, weight in theirs(file_in(place / "mixed")).items())


def test_a_repack_of_gguf_is_resumed(place: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(event: object) -> None:
        if type(event).__name__ == "LayerDone":
            raise Stop

    source, recipe = file_in(place / "int4-gguf"), Recipe.from_yaml(BACK["int4"][1])
    with pytest.raises(Stop):
        run(source, recipe, tmp_path / "out", config=place / "int4", on_event=stop)
    assert run(source, recipe, tmp_path / "out", config=place / "int4").resumed
    back(source, place / "int4", recipe, tmp_path / "whole")
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "whole")
    document = json.loads(files_of(tmp_path / "out")["quantkit.json"])
    assert (document["source"], document["tensors"][EXPERT]["scheme"]["group_size"]) == (source.stem, 32)


# ----------------------------------------------------------------------------------------------------- what is shown


def test_a_source_shows_what_gguf_py_decodes(place: Path) -> None:
    source_file = file_in(place / "mixed")
    expected = theirs(source_file)
    with open_model(source_file, place / "model") as source:
        assert {name for name in source.infos() if "layers.2." not in name} == expected.keys()
        assert source.stored_as(EXPERT) == IntScheme(bits=4, group_size=32, scale_dtype="float16")
        assert source.stored_as("model.layers.0.self_attn.o_proj.weight") == GgmlScheme(type="Q6_K")
        assert source.stored_as("model.layers.0.self_attn.kv_b_proj.weight") is None
        (note,) = source.notes
        assert note.startswith("model.layers.0.self_attn.kv_b_proj.weight and 1 more: stored in two parts as Q8_0")
        for name, weight in expected.items():
            assert torch.equal(source.read(name).float(), weight), name
            assert torch.equal(torch.cat(list(source.chunks(name, 4096))).float(), weight), name
            assert torch.equal(source.read_on(name, torch.device("cpu")).float(), weight), name
            scheme = source.stored_as(name)
            if scheme is not None:
                assert torch.equal(scheme.decode(**source.read_stored(name)), weight), name
        assert torch.equal(source.read_scale(EXPERT), source.read_stored(EXPERT)["scale"])
        assert torch.equal(source.read_rows(EXPERT, [7, 3, 7]).float(), expected[EXPERT][[7, 3, 7]])


def test_plain_tensors_keep_their_dtype(place: Path) -> None:
    with open_model(place / "model-gguf", place / "model") as source:
        assert source.infos()["model.layers.0.self_attn.kv_b_proj.weight"].dtype == "BF16"
        assert source.infos()["model.norm.weight"].dtype == "F32"
        assert source.read("model.layers.0.self_attn.kv_b_proj.weight").dtype == torch.bfloat16
        assert source.stored_as(EXPERT) is None
        assert source.notes == ()


def test_mtp_layers_come_along(place: Path, tmp_path: Path) -> None:
    run(place / "model", gguf_recipe(gguf_output(KEPT, mtp="keep")), tmp_path / "gguf")
    out = back(tmp_path / "gguf", place / "model", recipe_of(tokens=None), tmp_path / "out")
    before, after = stored(place / "model"), stored(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor.float(), after[name].float()) for name, tensor in before.items())


@pytest.mark.parametrize(
    "make", [deepseek_v2, deepseek_v32, glm4_moe_lite, glm_moe_dsa, kimi_k25], ids=lambda f: f.__name__
)
def test_relatives(make: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Every family whose GGUF files are written: all weights come back."""
    path, folder = written(tmp_path, make(**SMALL)), tmp_path / "source"
    before, after = stored(folder), stored(back(path, folder, recipe_of(DROP, tokens=None), tmp_path / "back"))
    assert len(after) > 20
    assert all(torch.equal(before[name].float(), tensor.float()) for name, tensor in after.items())
    assert {spec.name for spec in arch_of(make(**SMALL)).tensors() if spec.role is not Role.MTP} == after.keys()


def test_a_file_has_no_vision_tower(tmp_path: Path) -> None:
    path = written(tmp_path, kimi_k25(**SMALL))
    with open_model(path, tmp_path / "source") as source:
        (note,) = source.notes
    assert note == "GGUF holds the language model alone: outputs have no vision tower."


def test_what_is_made_of_it_says_that_vision_is_gone(tmp_path: Path) -> None:
    path, folder = written(tmp_path, kimi_k25(**SMALL)), tmp_path / "source"
    made = back(path, folder, recipe_of(DROP, tokens=None), tmp_path / "back")
    assert (
        "- The source holds the language model alone: there is no vision tower here" in (made / "README.md").read_text()
    )
    assert not vision_notes_of(made, folder)
    write_shards(folder, {**stored(folder), **VISION})
    (note,) = vision_notes_of(made, folder)
    assert note.startswith("vision tensors of the original, not here: ")
    assert all(name in note for name in VISION)
    run(folder, recipe_of(DROP, tokens=None), tmp_path / "whole")
    assert "vision tower" not in (tmp_path / "whole" / "README.md").read_text()
    assert not vision_notes_of(tmp_path / "whole", folder)


def vision_notes_of(made: Path, original: Path) -> list[str]:
    found = verify(made, source=original, sample=0, hashes=False)
    assert found.passed
    return [note.text for note in found.notes if "vision" in note.text]


def test_an_imatrix_is_no_source(place: Path, tmp_path: Path) -> None:
    recipe = gguf_recipe(gguf_output(preset="Q8_0"), tokens=256)
    run(place / "model", recipe, tmp_path / "out", base_dir=place)
    imatrix = tmp_path / "out" / "imatrix.gguf"
    with pytest.raises(SourceError, match=r"imatrix\.gguf: is an imatrix file, a model was needed\."):
        plan(imatrix, recipe_of(DROP, tokens=None), config=place / "model")


def test_a_plain_gguf_is_quantised_like_its_original(place: Path, tmp_path: Path) -> None:
    """The same codes by GPTQ from a split file as from the shards that it was made of."""
    recipe = recipe_of({"match": EXPERTS, "scheme": SCHEMES["int4"], "method": {"kind": "gptq"}}, DROP, tokens=256)
    split = gguf_recipe(gguf_output({"match": "*", "keep": "bf16"}, split_max_size="1MiB"))
    run(place / "model", split, tmp_path / "split")
    first, *others = sorted((tmp_path / "split").glob("*.gguf"))
    assert others
    base: dict[str, Any] = {"base_dir": place}
    run(place / "model", recipe, tmp_path / "a", **base)
    run(first, recipe, tmp_path / "b", config=place / "model", **base)
    one, two = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert one.keys() == two.keys()
    agree = [torch.equal(one[name], two[name]) for name in one if name.endswith("_packed")]
    assert len(agree) == 12
    assert all(agree)


def test_there_and_back_and_there_again(place: Path) -> None:
    """The file that llama.cpp runs, and a file of what became of it: the same bytes of every tensor. transformers loads
    what is between, and computes what it does with the first checkpoint."""
    out = place / "int4-between"
    back(file_in(place / "int4-gguf"), place / "int4", BACK["int4"][1], out)
    run(out, gguf_recipe(gguf_output(repack_rule("Q4_0"), KEPT)), place / "twice")
    assert stored_bytes(place / "twice") == stored_bytes(place / "int4-gguf")
    tokens = torch.arange(4, 36).view(2, 16)
    logits = [loaded_logits(folder, tokens) for folder in (place / "int4", out)]
    assert torch.equal(*logits)


# ------------------------------------------------------------------------------------------------------------- refusals


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(QuantkitError) as refused:
        action()
    assert "\n" not in refused.value.message
    return f"{refused.value.message} | {refused.value.hint}"


def opened(path: Path, config: Path | None) -> ModelSource:
    with open_model(path, config) as source:
        return source


def test_config_and_tokenizer_are_asked_for(place: Path, tmp_path: Path) -> None:
    source = file_in(place / "int4-gguf")
    asked = "Give --config DIR: the folder of the original's config.json and tokenizer."
    assert refusal(lambda: opened(source, None)) == (
        f"{source.parent / 'config.json'}: no such file; GGUF has no config.json and no tokenizer files. | {asked}"
    )
    shutil.copy(place / "model" / "config.json", tmp_path)
    assert refusal(lambda: opened(source, tmp_path)).startswith(f"{tmp_path / 'tokenizer.json'}: no such file; ")
    assert "is for GGUF files, and" in refusal(lambda: opened(place / "int4", place / "model"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(place / "model" / name, tmp_path)
    shutil.copy(source, tmp_path)
    assert opened(tmp_path, None).directory == tmp_path  # beside the file: no option is needed
    assert opened(tmp_path / source.name, None).directory == tmp_path


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("hidden_size", 512, "deepseek2.embedding_length is 256, config.json needs 512. | It is another model"),
        ("n_routed_experts", 8, "deepseek2.expert_count is 4, config.json needs 8."),
        ("num_hidden_layers", 3, "deepseek2.block_count is 2, config.json needs 3."),
        ("vocab_size", 2048, "has shape [1024, 256], config.json describes [2048, 256]."),
        ("routed_scaling_factor", 1.0, "deepseek2.expert_weights_scale is 2.5, config.json needs 1.0."),
    ],
)
def test_the_config_of_another_model_is_refused(
    key: str, value: float, found: str, place: Path, tmp_path: Path
) -> None:
    shutil.copytree(place / "model", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {key: value}))
    assert found in refusal(lambda: opened(place / "int4-gguf", tmp_path / "model"))


def test_another_tokenizer_is_refused(place: Path, tmp_path: Path) -> None:
    """Of the same size, with other texts; some may differ."""
    shutil.copytree(place / "model", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors*"))
    path = tmp_path / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    by_id = sorted(vocabulary, key=lambda text: vocabulary[text])
    swapped = {text: vocabulary[other] for text, other in zip(by_id[4:], [*by_id[5:], by_id[4]], strict=True)}
    tokenizer["model"]["vocab"] = vocabulary | swapped
    path.write_text(json.dumps(tokenizer))
    line = refusal(lambda: opened(place / "int4-gguf", tmp_path / "model"))
    assert line.startswith(f"{path}: has ")
    assert "for token 4, " in line
    assert "belongs to another model" in line
    two = {by_id[4]: vocabulary[by_id[5]], by_id[5]: vocabulary[by_id[4]]}
    tokenizer["model"]["vocab"] = vocabulary | two
    path.write_text(json.dumps(tokenizer))
    assert EXPERT in opened(place / "int4-gguf", tmp_path / "model").infos()


def test_missing_and_unknown_tensors_are_refused(place: Path, tmp_path: Path) -> None:
    source = place / "model"
    config = json.loads((source / "config.json").read_text())
    keys, tensors = gguf_writer.metadata(config), list(gguf_writer.tensors(config, gguf_writer.read_weights(source)))
    gguf_writer.write(tmp_path / "a.gguf", keys, (one for one in tensors if "blk.1.attn_v_b" not in one[0]))
    assert "lacks the tensor blk.1.attn_v_b.weight, which config.json describes." in refusal(
        lambda: opened(tmp_path / "a.gguf", source)
    )
    tensors += [("blk.0.attn_sinks", torch.ones(4))]
    gguf_writer.write(tmp_path / "b.gguf", keys, iter(tensors))
    assert "b.gguf: blk.0.attn_sinks: config.json's model has no such tensor." in refusal(
        lambda: opened(tmp_path / "b.gguf", source)
    )


def test_a_type_that_is_not_decoded_is_named(place: Path, tmp_path: Path) -> None:
    source = file_in(place / "int4-gguf")
    content = source.read_bytes()
    name = b"output.weight"  # name, dimensions, their sizes, type
    at = content.index(len(name).to_bytes(8, "little") + name) + 8 + len(name) + 4 + 16
    assert content[at : at + 4] == gguf.GGMLQuantizationType.BF16.to_bytes(4, "little")
    (tmp_path / "iq.gguf").write_bytes(
        content[:at] + gguf.GGMLQuantizationType.TQ1_0.to_bytes(4, "little") + content[at + 4 :]
    )
    assert "output.weight is TQ1_0, a type that quantkit does not decode." in refusal(
        lambda: opened(tmp_path / "iq.gguf", place / "int4")
    )


def test_a_truncated_file_is_refused(place: Path, tmp_path: Path) -> None:
    source = file_in(place / "int4-gguf")
    (tmp_path / "cut.gguf").write_bytes(source.read_bytes()[:-4096])
    assert "cut.gguf: truncated, " in refusal(lambda: opened(tmp_path / "cut.gguf", place / "int4"))


def test_types_without_a_form_in_the_output_are_named(place: Path) -> None:
    recipe = Recipe.from_yaml("repack-q4_0-vllm")
    with pytest.raises(QuantkitError) as refused:
        plan(place / "mixed", recipe, config=place / "model")
    lines = refused.value.message.splitlines()
    assert lines[0] == (
        "output w4a16: model.layers.0.self_attn.o_proj.weight: compressed-tensors cannot store Q6_K. Block types of "
        "ggml go into outputs of format: gguf; keep: f32 decodes them, keep: bf16 rounds."
    )
    assert (
        "output w4a16: model.embed_tokens: planned as int5 g32, but vLLM reads it only unquantised; keep it." in lines
    )


def changed_block(place: Path, path: Path, content: bytes) -> Path:
    """The GGUF of int4 or mxfp4 with other bytes in the first rows of an expert."""
    shutil.copy(file_in(place), path)
    (tensor,) = (tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == STACKED)
    with path.open("r+b") as file:
        file.seek(int(tensor.data_offset) + 2 * int(tensor.n_bytes) // 4)
        file.write(content)
    return path


def test_scales_that_are_no_numbers_are_refused(place: Path, tmp_path: Path) -> None:
    path = changed_block(place / "int4-gguf", tmp_path / "int4.gguf", b"\x00\x7c")  # float16 infinity
    with open_model(path, place / "int4") as source:
        for read in (source.read, source.read_stored):
            with pytest.raises(SourceError, match="values are NaN or infinite"):
                read(EXPERT)
    path = changed_block(place / "mxfp4-gguf", tmp_path / "mxfp4.gguf", b"\xff")
    with (
        open_model(path, place / "mxfp4") as source,
        pytest.raises(SourceError, match="1 of 2,048 scales are not the exponent of a number"),
    ):
        source.read_stored(EXPERT)


def test_holes_are_refused(place: Path, tmp_path: Path) -> None:
    hole = bytes(LEAST_ZEROS // 32 * 18 + 4096)
    path = changed_block(place / "int4-gguf", tmp_path / "int4.gguf", hole)
    with open_model(path, place / "int4") as source:
        source.read_stored(EXPERT)
        source.refuse_zeros({EXPERT: LEAST_ZEROS})
        for read in (source.read, source.read_stored):
            with pytest.raises(SourceError, match=rf"{EXPERT}: [\d,]+ numbers in a row are zero"):
                read(EXPERT)


def test_mxfp4_is_shown_as_such(place: Path) -> None:
    with open_model(place / "mxfp4-gguf", place / "mxfp4") as source:
        assert source.stored_as(EXPERT) == Mxfp4Scheme()


def test_a_scheme_for_a_file_of_a_preset_decodes_its_tables(place: Path) -> None:
    """compressed-tensors has no Q5_0: the embeddings are kept in bfloat16, all else plans as for a folder."""
    source, config = place / "mixed", place / "model"
    asked = Shorthand(scheme="w4a16-g32", method="rtn")
    made = shorthand_recipe(config, asked, packed_tables(source, config)).model_copy(update={"validation": None})
    assert [rule.match for rule in made.outputs[0].rules if rule.keep == "bf16"] == ["role:embed"]
    (output,) = plan(source, made, config=config).outputs
    assert {size.what for size in output.sizes if size.role is Role.EMBED} == {"bf16"}
    assert packed_tables(config, None) == frozenset()
