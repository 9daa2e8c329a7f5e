"""What `inspect` says about GGUF models: sound ones, and such as llama.cpp runs wrongly or not at all."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from quantkit.arch import arch_of
from quantkit.errors import SourceError
from quantkit.formats.gguf.imatrix import ImatrixEntry, imatrix_layout
from quantkit.formats.gguf.layout import GgufTensor, layout_gguf
from quantkit.formats.gguf.values import string
from quantkit.formats.preallocated import PreallocatedFiles
from quantkit.inspect.gguf import GgufInspection
from quantkit.inspect.path import inspect_path
from tests.inspect.gguf_files import Shapes, tiny_file, tokenizer_keys, write_file
from tests.tiny_models import tiny_config

K_B, V_B = "blk.1.attn_k_b.weight", "blk.1.attn_v_b.weight"


@pytest.fixture(scope="module")
def tiny() -> tuple[dict[str, Any], Shapes]:
    return tiny_file()


def inspected(path: Path) -> GgufInspection:
    found = inspect_path(path)
    assert isinstance(found, GgufInspection)
    return found


# -------------------------------------------------------------------------------------------------------------- sound


@pytest.mark.parametrize(
    ("changes", "mtp"),
    [
        ({}, False),
        ({}, True),
        ({"q_lora_rank": None}, False),
        ({"tie_word_embeddings": True, "first_k_dense_replace": 0, "rope_scaling": None}, False),
    ],
)
def test_what_another_writer_made_is_not_unusual(tmp_path: Path, changes: dict[str, Any], mtp: bool) -> None:
    """Weights by role equal the family's table, which the file's writer does not use."""
    changes = {"num_nextn_predict_layers": int(mtp), **changes}
    keys, shapes = tiny_file(mtp=mtp, **changes)
    found = inspected(write_file(tmp_path / "tiny.gguf", keys, shapes))
    assert found.unusual == ()
    assert found.parameters == sum(math.prod(shape) for shape, _ in shapes.values())
    expected = Counter[str]()
    for spec in arch_of(tiny_config(**changes)).tensors():
        expected[spec.role.value] += math.prod(spec.shape)
    by_role = Counter[str]()
    for holding in found.holdings:
        by_role[holding.role] += holding.parameters
    assert by_role == expected


def test_what_is_told(tmp_path: Path, tiny: tuple[dict[str, Any], Shapes]) -> None:
    keys, shapes = tiny
    path = write_file(tmp_path / "tiny.gguf", {**keys, "general.file_type": 15}, shapes)
    found = inspected(tmp_path)
    assert (found.path, found.architecture, found.name, found.file_type) == (path, "deepseek2", "tiny", "Q4_K_M")
    assert (found.files, found.file_bytes, found.stored_tensors) == (1, path.stat().st_size, len(shapes))
    settings = found.settings
    assert (settings["block_count"], settings["expert_count"], settings["expert_group_used_count"]) == (3, 12, 2)
    assert settings["rope.scaling.yarn_log_multiplier"] == 0.1
    assert found.vocabulary is not None
    assert (found.vocabulary.pre, found.vocabulary.tokens, found.vocabulary.chat_template) == ("deepseek-v3", 256, True)
    rows = {(holding.role, holding.what): holding for holding in found.holdings}
    assert rows["expert", "BF16"].weights == 2 * 3
    assert rows["router", "F32"].bpw == 32
    assert found.bpw == pytest.approx(8 * found.nbytes / found.parameters)


def test_other_architectures_are_listed_by_type(tmp_path: Path) -> None:
    keys = {"gemma3.block_count": 1, "gemma3.context_length": 4096, "general.file_type": 1024 + 7, **tokenizer_keys(4)}
    shapes: Shapes = {"token_embd.weight": ((4, 32), "Q8_0"), "blk.0.attn_q.weight": ((32, 32), "Q8_0")}
    found = inspected(write_file(tmp_path / "x.gguf", keys, shapes, "gemma3"))
    assert [(holding.role, holding.what, holding.weights) for holding in found.holdings] == [("-", "Q8_0", 2)]
    assert (found.settings["context_length"], found.file_type, found.unusual) == (4096, "Q8_0", ())


def test_any_file_of_a_split_set(tmp_path: Path) -> None:
    tensors = [GgufTensor(f"blk.{layer}.a.weight", (2, 32), "F32") for layer in range(3)]
    layout = layout_gguf("m", {"general.architecture": string("llama")}, tensors, 256)
    PreallocatedFiles.open(tmp_path, layout).sync()
    paths = sorted(tmp_path.glob("*.gguf"))
    assert len(paths) == 3
    for path in (tmp_path, *paths):
        found = inspected(path)
        assert (found.path, found.files, found.stored_tensors) == (paths[0], 3, 3)
    paths[1].unlink()
    with pytest.raises(SourceError, match=r"m-00002-of-00003\.gguf of the 3 files of this model is missing"):
        inspect_path(tmp_path)


# ------------------------------------------------------------------------------------------------------------ unusual


def with_keys(**changes: Any) -> Any:
    """Set keys of the architecture ("__" for dots), None takes one out."""
    return {f"deepseek2.{key.replace('__', '.')}": value for key, value in changes.items()}


WITHOUT_MLA = with_keys(attention__key_length_mla=None, attention__value_length_mla=None) | with_keys(
    attention__key_length=64, attention__value_length=32
)
LEGACY = {f"blk.{layer}.attn_kv_b.weight": ((4 * 64, 128), "BF16") for layer in range(3)} | {
    f"blk.{layer}.attn_{part}_b.weight": None for layer in range(3) for part in "kv"
}
MISSING = {
    "attention.head_count": "llama.cpp takes 0 and does not load",
    "attention.head_count_kv": "llama.cpp takes 4 and stops",
    "attention.key_length": "llama.cpp takes 32 and stops",
    "attention.key_length_mla": "llama.cpp does not load",
    "attention.kv_lora_rank": "llama.cpp does not load",
    "attention.layer_norm_rms_epsilon": "llama.cpp does not load",
    "block_count": "llama.cpp does not load",
    "context_length": "llama.cpp does not load",
    "expert_count": "llama.cpp takes 0 and does not load",
    "expert_feed_forward_length": "llama.cpp does not load",
    "expert_group_used_count": "llama.cpp takes 0 and does not load",
    "expert_shared_count": "llama.cpp does not load",
    "expert_used_count": "llama.cpp takes 0 and does not load",
    "expert_weights_norm": "llama.cpp takes false, the weights of",
    "expert_weights_scale": "llama.cpp takes 1, what routed experts add is not scaled",
    "feed_forward_length": "llama.cpp takes 0 and does not load",
    "leading_dense_block_count": "llama.cpp looks for experts in every layer and does not load",
    "nextn_predict_layers": "llama.cpp takes the MTP layer for a decoder layer and does not load",
    "rope.dimension_count": "llama.cpp takes 160 and does not load",
    "rope.freq_base": "llama.cpp takes 10000, which DeepSeek V3 has",
    "rope.scaling.factor": "llama.cpp takes 1, positions are not scaled",
    "rope.scaling.original_context_length": "llama.cpp takes context_length, 256",
    "rope.scaling.type": "llama.cpp takes linear, which",
}
ODD: list[tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = [
    (WITHOUT_MLA, LEGACY, ("3 layers with kv_b_proj in one tensor: blk.0.attn_kv_b.weight", "before latent attention")),
    ({}, LEGACY, ("looks for attn_k_b and attn_v_b instead",)),
    (with_keys(expert_gating_func=None), {}, ("deepseek2.expert_gating_func is missing: llama.cpp then",)),
    (with_keys(expert_gating_func=1), {}, ("deepseek2.expert_gating_func is 1:",)),
    (with_keys(rope__scaling__yarn_log_multiplier=1.0), {}, ("yarn_log_multiplier is 1: ", "multiplies it by ten")),
    (with_keys(rope__scaling__yarn_log_multiplier=None), {}, ("yarn_log_multiplier is missing: llama.cpp takes 0",)),
    (with_keys(rope__scaling__yarn_beta_fast=1.0), {}, ("yarn_beta_fast or _slow is not 32 or 1", "--yarn-beta-fast")),
    (with_keys(attention__q_lora_rank=None), {}, ("q_lora_rank is missing: llama.cpp refuses the file",)),
    (with_keys(embedding_length=None), {}, ("embedding_length is missing: llama.cpp does not load",)),
    (with_keys(embedding_length=1.5), {}, ("1 keys that the architecture needs are no whole numbers: deepse",)),
    (with_keys(block_count=4), {}, ("1 layers without any tensor: blk.3", "missing: blk.3.attn_norm.weight")),
    (with_keys(block_count=2), {}, ("1 layers beyond the last: blk.2 (deepseek2.block_count is 2)",)),
    (with_keys(block_count=4_000_000_000), {}, ("4,093 layers without", "describes no model")),
    (with_keys(expert_count=13), {}, ("10 tensors whose shape does not fit the metadata: blk.1.ffn_gate_inp.weight",)),
    ({}, {K_B: ((4, 128, 32), "MXFP4"), V_B: ((4, 32, 128), "MXFP4")}, ("2 parts of kv_b_proj in MXFP4", "MXFP4_MOE")),
    ({}, {"blk.2.ffn_up_exps.weight": None}, ("1 tensors of the architecture are missing: blk.2.ffn_up_exps.weight",)),
    ({}, {"blk.2.exp_probs_b.bias": None}, ("1 tensors of the architecture are missing: blk.2.exp_probs_b.bias",)),
    ({}, {"blk.2.lora.weight": ((4, 4), "F32")}, ("1 tensors that the architecture does not have: blk.2.lora.weight",)),
    ({}, {"blk.1.ffn_gate_inp.weight": ((12, 128), "F16")}, ("1 norms, biases or routers that are not float32",)),
    ({}, {"output.weight": ((256, 256), "TQ2_0")}, ("1 tensors in TQ2_0, which quantkit cannot decode", "shape")),
    ({"tokenizer.ggml.model": "no_vocab"}, {}, ("no tokenizer: ",)),
    ({"tokenizer.ggml.model": None}, {}, ("no tokenizer: ",)),
    ({"tokenizer.ggml.pre": None, "tokenizer.ggml.merges": None}, {}, ("no tokenizer.ggml.pre", "ggml.merges")),
    ({"tokenizer.ggml.tokens": ["a"]}, {}, ("the tokenizer has 1 tokens, token_embd.weight 256 rows",)),
    ({"general.type": "adapter"}, {}, ("general.type is 'adapter', not a whole model",)),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "tensors", "said"), ODD, ids=[said[0][:40] for _, _, said in ODD])
def test_unusual(
    tmp_path: Path,
    tiny: tuple[dict[str, Any], Shapes],
    keys: dict[str, Any],
    tensors: dict[str, Any],
    said: tuple[str, ...],
) -> None:
    merged = {key: value for key, value in {**tiny[0], **keys}.items() if value is not None}
    shapes = {name: entry for name, entry in {**tiny[1], **tensors}.items() if entry is not None}
    found = inspected(write_file(tmp_path / "odd.gguf", merged, shapes))
    text = "\n".join(found.unusual)
    for words in said:
        assert words in text
    assert len(found.unusual) <= 2, text


@pytest.mark.parametrize(("key", "said"), MISSING.items())
def test_each_missing_key_is_named(tmp_path: Path, key: str, said: str) -> None:
    keys, shapes = tiny_file(mtp=True)
    del keys[f"deepseek2.{key}"]
    found = inspected(write_file(tmp_path / "part.gguf", keys, shapes)).unusual
    (line,) = (line for line in found if line.startswith(f"deepseek2.{key} is missing"))
    assert line.startswith(f"deepseek2.{key} is missing: {said}")


def test_keys_that_a_model_may_lack(tmp_path: Path, tiny: tuple[dict[str, Any], Shapes]) -> None:
    """V2 has no selection bias, softmax and weights that are not normed; groups are few models' own."""
    keys, shapes = tiny
    optional = ("expert_gating_func", "expert_weights_norm", "expert_group_count", "expert_group_used_count")
    keys = {key: value for key, value in keys.items() if key.removeprefix("deepseek2.") not in optional}
    shapes = {name: entry for name, entry in shapes.items() if not name.endswith("exp_probs_b.bias")}
    assert inspected(write_file(tmp_path / "v2.gguf", keys, shapes)).unusual == ()


def test_a_file_without_any_key_of_the_architecture(tmp_path: Path, tiny: tuple[dict[str, Any], Shapes]) -> None:
    keys = {key: value for key, value in tiny[0].items() if not key.startswith("deepseek2.")}
    found = inspected(write_file(tmp_path / "bare.gguf", keys, tiny[1])).unusual
    assert sum("is missing: llama.cpp" in line for line in found) == 19
    assert len(found) < 25


def test_experts_of_v3_without_groups(tmp_path: Path) -> None:
    keys, shapes = tiny_file(num_hidden_layers=2, n_routed_experts=256, moe_intermediate_size=32, hidden_size=64)
    for key in ("deepseek2.expert_group_count", "deepseek2.expert_group_used_count"):
        del keys[key]
    (line,) = inspected(write_file(tmp_path / "v3.gguf", keys, shapes)).unusual
    assert line.startswith("deepseek2.expert_group_count is missing: llama.cpp chooses without groups")


# ------------------------------------------------------------------------------------------------------ imatrix beside


def write_imatrix(folder: Path, *entries: ImatrixEntry) -> None:
    PreallocatedFiles.open(folder, imatrix_layout(entries, ["text.txt"], 4, 512)).sync()


def test_imatrix_beside(tmp_path: Path, tiny: tuple[dict[str, Any], Shapes]) -> None:
    write_imatrix(tmp_path, ImatrixEntry(K_B, 4, 32), ImatrixEntry("blk.1.ffn_up_exps.weight", 12, 128, experts=True))
    write_file(tmp_path / "tiny.gguf", *tiny)
    found = inspected(tmp_path)
    assert found.unusual == ()
    assert found.imatrix is not None
    beside = found.imatrix
    assert (beside.datasets, beside.chunks, beside.weights, beside.fitting) == (("text.txt",), 4, 2, 2)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (ImatrixEntry(K_B, 4, 16), "imatrix.gguf: blk.1.attn_k_b.weight: has 64 values and 1 counts"),
        (ImatrixEntry("blk.0.attn_q.weight", 1, 16), "imatrix.gguf has none of the model's weights"),
        (None, "imatrix.gguf: is no imatrix, neither a GGUF nor"),
    ],
)
def test_foreign_imatrix_beside(
    tmp_path: Path, tiny: tuple[dict[str, Any], Shapes], entry: ImatrixEntry | None, said: str
) -> None:
    if entry is None:
        (tmp_path / "imatrix.gguf").write_bytes(b"GGU")
    else:
        write_imatrix(tmp_path, entry)
    path = write_file(tmp_path / "tiny.gguf", *tiny)
    (line,) = inspected(path).unusual
    assert line.startswith(said)


# ----------------------------------------------------------------------------------------------------------- refusals


def test_refusals(tmp_path: Path) -> None:
    model, folder = tmp_path / "model.gguf", tmp_path / "out" / "q4"
    model.write_bytes(b"\x00" * 100)
    folder.mkdir(parents=True)
    (folder / "a.gguf").write_bytes(b"")
    text = tmp_path / "notes.txt"
    text.write_text("hello\n" * 9)
    (tmp_path / "imatrix.dat").write_text("hello\n" * 9)
    for path, said in (
        (model, "is no GGUF file, it begins with"),
        (text, "is neither a GGUF file nor a folder"),
        (tmp_path / "imatrix.dat", "is no imatrix, neither"),
        (tmp_path / "none", "no such file"),
        (tmp_path / "out", "holds no checkpoint itself, but folders with one: q4"),
        (folder, "truncated, 0 bytes"),
    ):
        with pytest.raises(SourceError, match=said) as caught:
            inspect_path(path)
        assert "\n" not in caught.value.message


@pytest.mark.parametrize("value", [0, 2**32 - 1, -1.5, float("nan"), "61\x07", [3, 4], True], ids=repr)
def test_any_value_of_any_key_is_survived(
    tmp_path: Path, tiny: tuple[dict[str, Any], Shapes], value: int | float | str | bool | list[int]
) -> None:
    """Metadata is a stranger's: odd values are told of, and none of them ends in a traceback or in endless lists."""
    for key in tiny[0]:
        if key not in ("general.type", "general.architecture"):
            found = inspected(write_file(tmp_path / "odd.gguf", {**tiny[0], key: value}, tiny[1]))
            assert len(found.unusual) < 6
            assert all(line.isprintable() and len(line) < 400 for line in found.unusual)
            assert all(not isinstance(shown, str) or shown.isprintable() for shown in found.settings.values())
