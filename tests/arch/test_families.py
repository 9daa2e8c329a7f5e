"""What every family of grouped-query attention promises: a new one joins by its line in `GROUPED`.

Logits (`test_relatives`), the Fisher pass (`tests/sensitivity/test_exact`), conversions
(`tests/convert/test_relatives`), types of presets (`tests/runtimes/test_llama_quantize`) and docs/models.md are held
against the same table.
"""

from __future__ import annotations

import re
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from quantkit.arch import arch_of
from quantkit.arch.base import Block, DenseBlock, ExpertBlock, LinearRows, ModelArch, NormWeight, Producer
from quantkit.arch.gqa import attention
from quantkit.arch.gqa.attention import GqaShape
from quantkit.arch.gqa.model import PAIRED
from quantkit.arch.parts import in_parts
from quantkit.arch.rope import Rope
from quantkit.errors import ConfigError, SourceError
from tests.arch.grouped import GROUPED
from tests.oracles import forward
from tests.tiny_models import random_weights

EVERY = pytest.mark.parametrize("name", GROUPED)
OTHERS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_key_value_heads": 4, "norm_topk_prob": False},
    "llama": {"num_key_value_heads": 4, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "qwen2": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
}
"""Changes under which a family is looked at once more."""


def blocks_of(arch: ModelArch) -> list[Block]:
    layers = (*range(arch.n_layers), *arch.mtp_layers())
    return [block for layer in layers for sublayer in arch.sublayers(layer) for block in sublayer]


def weights_of(config: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in random_weights(config, seed=4).items()}


@EVERY
def test_each_linear_is_in_one_group(name: str) -> None:
    arch = arch_of(GROUPED[name]())
    linears = [linear for block in blocks_of(arch) for linear in block.linears if not linear.endswith(PAIRED)]
    assert sorted(linears) == sorted(spec.name for spec in arch.tensors() if spec.linear)
    names = [spec.name for spec in arch.tensors()]
    assert len(names) == len(set(names))


@EVERY
def test_q_k_v_and_gate_up_share_their_inputs(name: str) -> None:
    """They are one matrix in vLLM, too."""
    arch = arch_of(GROUPED[name]())
    fused = {spec.name: spec.fused for spec in arch.tensors()}
    stages = [stage for block in blocks_of(arch) if isinstance(block, DenseBlock) for stage in block.stages]
    for group in (group for stage in stages for group in stage.groups):
        whole = [linear for linear in group.linears if not linear.endswith(PAIRED)]
        assert {fused[linear] for linear in whole} in ({"qkv_proj"}, {"gate_up_proj"}, {None})
        assert (len(whole) > 1) == (fused[whole[0]] is not None)


@EVERY
def test_stages_read_only_norms_and_earlier_linears(name: str) -> None:
    config = GROUPED[name]()
    arch, weights = arch_of(config), weights_of(config)
    x = torch.randn(3, 20, config["hidden_size"], generator=torch.Generator().manual_seed(6))
    shapes = {spec.name: spec.shape for spec in arch.tensors() if spec.linear}
    for block in blocks_of(arch):
        final: set[str] = set()
        for stage in block.stages if isinstance(block, DenseBlock) else ():
            asked: list[str] = []

            def lookup(tensor: str, asked: list[str] = asked) -> Tensor:
                asked.append(tensor)
                return weights[tensor]

            inputs = stage.inputs(lookup, x)
            assert {tensor for tensor in asked if tensor in shapes} <= final
            for group, tokens in zip(stage.groups, inputs, strict=True):
                assert tuple(tokens.shape) == (60, shapes[group.linears[0]][1])
            final |= {linear for group in stage.groups for linear in group.linears}


def producers(arch: ModelArch) -> dict[Producer, None]:
    found: dict[Producer, None] = {}
    for block in blocks_of(arch):
        if isinstance(block, ExpertBlock):
            found |= dict.fromkeys((*block.down_producers, *([block.producer] if block.producer else [])))
        else:
            groups = (group for stage in block.stages for group in stage.groups)
            found |= {group.producer: None for group in groups if group.producer}
    return found


@pytest.mark.parametrize("changes", [False, True], ids=["", "changed"])
@EVERY
def test_all_producers_at_once_leave_the_logits(name: str, changes: bool) -> None:
    if changes and name not in OTHERS:
        pytest.skip("no changes of this family")
    config = GROUPED[name](**(OTHERS[name] if changes else {}))
    arch, weights = arch_of(config), weights_of(config)
    changed, generator = dict(weights), torch.Generator().manual_seed(9)
    for producer in producers(arch):
        width = weights[producer.readers[0]].shape[1]
        factors = torch.randint(-3, 4, (width,), generator=generator).float().exp2()
        changed[producer.tensor] = producer.divided(changed[producer.tensor], factors)
        for reader in producer.readers:
            changed[reader] = changed[reader] * factors
    assert any(isinstance(producer, NormWeight) for producer in producers(arch))
    assert any(isinstance(producer, LinearRows) for producer in producers(arch))
    tokens = torch.randint(arch.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    expected = forward.logits(arch, weights.__getitem__, tokens)
    found = forward.logits(arch, changed.__getitem__, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def official_in_gguf(name: str) -> str:
    """As gguf-py's map knows it: experts of a layer have one name, without number."""
    return re.sub(r"\.experts\.\d+\.", ".experts.", name)


@EVERY
def test_gguf_names_are_those_of_gguf_py(name: str) -> None:
    arch = arch_of(GROUPED[name]())
    model = arch.gguf()
    called = str(model.key_values(mtp=False)["general.architecture"])
    kinds = {text: kind for kind, text in gguf.MODEL_ARCH_NAMES.items()}
    if called not in kinds:
        pytest.skip(f"gguf-py {gguf.__name__} has no {called} yet")
    names = gguf.get_tensor_name_map(kinds[called], arch.n_layers + len(arch.mtp_layers()))
    known = 0
    for spec in in_parts(arch):
        stored, _ = model.stored_name(spec.name)
        expected = names.get_name(official_in_gguf(spec.official), try_suffixes=(".weight", ".bias"))
        if expected is None:  # the converter renames biases of the selection before it looks them up
            assert "bias" in spec.name, spec.name
            continue
        known += 1
        assert stored == expected, spec.name
    assert known > 10


@EVERY
def test_gguf_keys_are_read_back(name: str) -> None:
    """A file with the model's keys is the model; one with another number is not; what has no place is refused."""
    model = arch_of(GROUPED[name]()).gguf()
    keys = model.key_values(mtp=False)
    assert model.read(keys.get).notes == ()
    prefix = keys["general.architecture"]
    for key, other in {"attention.head_count_kv": 1, "embedding_length": 64, "block_count": 2}.items():
        with pytest.raises(SourceError, match=rf"{prefix}\.{key} is {other}, config\.json needs"):
            model.read({**keys, f"{prefix}.{key}": other}.get)
    with pytest.raises(SourceError, match="has no place for this tensor"):
        model.stored_name("model.layers.0.self_attn.strange.weight")


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("llama", {"attention_bias": True}, "attention_bias is True, only False is computed"),
        ("mixtral", {"sliding_window": 4096}, "sliding_window is 4096, only None is computed"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen3_moe", {"num_experts": 0.5}, "num_experts is 0.5"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, 1 to 8 was needed"),
        ("glm4_moe", {"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ("minimax_m2", {"rotary_dim": 65}, "65 dimensions of a head of 64 cannot be rotated"),
        ("qwen2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling"),
    ],
)
def test_what_is_not_computed_is_refused(name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        arch_of(GROUPED[name](**changes))


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is False, llama.cpp takes True for qwen3moe"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"layers \[1\] have no experts"),
        ("ernie4_5_moe", {"moe_layer_interval": 2}, r"layers \[0, 2\] have no experts"),
        (
            "qwen2",
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 1.0}},
            "yarn scales by 1, llama.cpp by 1.13863",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        arch_of(GROUPED[name](**changes)).gguf().key_values(mtp=False)


@pytest.mark.parametrize(("window", "sinks"), [(None, False), (5, False), (None, True), (5, True)])
@pytest.mark.parametrize("chunk", [1, 3000])
def test_attention_is_the_textbook_s(
    window: int | None, sinks: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole heads of one row, or as many as there are, windows and sinks."""
    monkeypatch.setattr(attention, "CHUNK_ELEMENTS", chunk)
    shape = GqaShape(4, 2, 16, Rope(8, 1e4, False, 64), 1e-6, True, "flat", window, sinks)
    random = torch.Generator().manual_seed(3)
    names = attention.GqaNames("")
    sizes: dict[str, tuple[int, ...]] = {names.q: (64, 32), names.k: (32, 32), names.v: (32, 32)}
    sizes |= {names.q_bias: (64,), names.k_bias: (32,), names.v_bias: (32,), names.sinks: (4,)}
    sizes |= {names.q_norm: (64,), names.k_norm: (32,), names.input_norm: (32,)}
    weights = {name: torch.randn(size, generator=random) * 32**-0.25 for name, size in sizes.items()}
    x = torch.randn(2, 11, 32, generator=random)
    (found,) = attention.attention_block("", shape).stages[-1].inputs(weights.__getitem__, x)
    torch.testing.assert_close(found, textbook_attention(shape, names, weights, x), rtol=1e-5, atol=1e-5)


def textbook_attention(shape: GqaShape, names: attention.GqaNames, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Token by token and head by head."""

    def normed(values: Tensor, name: str) -> Tensor:
        return values * (values.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weights[name]

    def turned(head: Tensor, position: int) -> Tensor:
        half = shape.rope.dim // 2
        angles = position * 1e4 ** (-torch.arange(half) / half)
        a, b = head[:half].clone(), head[half : 2 * half].clone()
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin(), head[2 * half :]))

    rows: list[Tensor] = []
    for row in normed(x, names.input_norm):
        q = normed(row @ weights[names.q].T + weights[names.q_bias], names.q_norm).view(len(row), 4, 16)
        k = normed(row @ weights[names.k].T + weights[names.k_bias], names.k_norm).view(len(row), 2, 16)
        v = (row @ weights[names.v].T + weights[names.v_bias]).view(len(row), 2, 16)
        for i in range(len(row)):
            first = max(0, i + 1 - (shape.window or i + 1))
            heads: list[Tensor] = []
            for head in range(4):
                query = turned(q[i, head], i)
                scores = torch.stack([query @ turned(k[j, head // 2], j) / 4 for j in range(first, i + 1)])
                sink = weights[names.sinks][head : head + 1] if shape.sinks else scores.new_empty(0)
                share = torch.cat((scores, sink)).softmax(0)[: len(scores)]
                heads.append(share @ v[first : i + 1, head // 2])
            rows.append(torch.cat(heads))
    return torch.stack(rows)
