"""What a new family costs: the class `Toy` and one line in `ARCHS`. Its names, its attention and its router are none of
DeepSeek's; planning, conversion, the config for vLLM and its checks work from what the class says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import quantkit.arch
from quantkit.arch import moe
from quantkit.arch.base import (
    CheckpointVariants,
    DenseBlock,
    GgufModel,
    InputGroup,
    LinearPart,
    LinearRows,
    MlpNames,
    MtpLayer,
    NormWeight,
    RoutedExperts,
    Routing,
    ServingSizes,
    Stage,
    Sublayer,
)
from quantkit.arch.ops import linear, rms_norm
from quantkit.errors import ConfigError, PlanError
from quantkit.formats.folder import FolderSource
from quantkit.formats.layouts.compressed_tensors import COMPRESSED_TENSORS
from quantkit.plan.forecast import forecast
from quantkit.runtimes.gpus import parse_gpus
from quantkit.runtimes.vllm.memory import Fit
from quantkit.tensors import Projection, Role, TensorSpec
from tests.convert.jobs import int4, recipe_of, run, write_text, write_tokenizer
from tests.tiny_models import random_weights, write_shards

if TYPE_CHECKING:
    from quantkit.arch.base import Weights

NAMES = MlpNames(gate="w1", up="w3", down="w2")
EPS = 1e-5


class Toy:
    """Mixtral's names; attention of equal heads without positions, and experts chosen by softmax."""

    embed, final_norm, lm_head = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
    longest_exact: int | None = None
    stacked_experts = False

    def __init__(self, config: Mapping[str, object]) -> None:
        sizes = cast("Mapping[str, int]", config)
        self.n_layers, self.hidden_size, self.vocab_size = sizes["layers"], sizes["hidden"], sizes["vocab_size"]
        self.heads, self.experts, self.width = sizes["heads"], sizes["experts"], sizes["width"]

    def tensors(self) -> Iterator[TensorSpec]:
        table, norm = (self.vocab_size, self.hidden_size), (self.hidden_size,)
        yield TensorSpec(self.embed, table, Role.EMBED, table=True)
        for layer in range(self.n_layers):
            prefix = f"model.layers.{layer}."
            yield TensorSpec(f"{prefix}input_layernorm.weight", norm, Role.NORM, layer)
            yield from self._attention_tensors(layer, f"{prefix}self_attn.")
            yield TensorSpec(f"{prefix}post_attention_layernorm.weight", norm, Role.NORM, layer)
            yield from self._expert_tensors(layer, f"{prefix}block_sparse_moe.")
        yield TensorSpec(self.final_norm, norm, Role.NORM)
        yield TensorSpec(self.lm_head, table, Role.LM_HEAD, table=True)

    def _attention_tensors(self, layer: int, prefix: str) -> Iterator[TensorSpec]:
        shape = (self.hidden_size, self.hidden_size)
        for name, projection in (("q", Projection.Q), ("k", Projection.K), ("v", Projection.V), ("o", Projection.OUT)):
            fused = None if name == "o" else "qkv_proj"
            yield TensorSpec(
                f"{prefix}{name}_proj.weight",
                shape,
                Role.ATTENTION,
                layer,
                projection=projection,
                linear=True,
                fused=fused,
            )

    def _expert_tensors(self, layer: int, prefix: str) -> Iterator[TensorSpec]:
        into, out = (self.width, self.hidden_size), (self.hidden_size, self.width)
        yield TensorSpec(f"{prefix}gate.weight", (self.experts, self.hidden_size), Role.ROUTER, layer, by_expert=True)
        shapes = {
            NAMES.gate: (Projection.GATE, into),
            NAMES.up: (Projection.UP, into),
            NAMES.down: (Projection.DOWN, out),
        }
        for expert in range(self.experts):
            for name, (projection, shape) in shapes.items():
                full = f"{prefix}experts.{expert}.{name}.weight"
                yield TensorSpec(full, shape, Role.EXPERT, layer, expert, projection, linear=True)

    def variants(self) -> CheckpointVariants:
        return CheckpointVariants()

    def parts(self) -> Mapping[str, LinearPart]:
        return {}

    def mtp_layers(self) -> Mapping[int, MtpLayer]:
        return {}

    def gguf(self) -> GgufModel:
        raise ConfigError("This family has no GGUF form.")

    def serving(self) -> ServingSizes:
        head = self.hidden_size // self.heads
        return ServingSizes(self.heads, head, head, 4 * self.hidden_size, self.heads, 2, self.width, 4096)

    def routed_experts(self) -> RoutedExperts:
        return RoutedExperts(self.experts, 1, 1, 1, 2, config_key="experts")

    def with_experts(self, count: int) -> Toy:
        left = copy(self)
        left.experts = count
        return left

    def sublayers(self, layer: int) -> tuple[Sublayer, ...]:
        prefix = f"model.layers.{layer}."
        norm = moe.Norm(f"{prefix}post_attention_layernorm.weight", EPS)
        router = SoftmaxRouter(f"{prefix}block_sparse_moe.gate.weight", 2)
        experts = [moe.Mlp.named(f"{prefix}block_sparse_moe.experts.{e}.", NAMES) for e in range(self.experts)]
        producer = NormWeight(norm.weight, (router.weight, *moe.readers(experts)))
        return (attention(prefix, self.heads),), (moe.expert_block("experts", experts, norm, router, producer),)

    def final_hidden(self, weights: Weights, x: Tensor) -> Tensor:
        return rms_norm(x, weights(self.final_norm), EPS)


@dataclass(frozen=True, slots=True)
class SoftmaxRouter:
    weight: str
    top_k: int

    def route(self, weights: Weights, h: Tensor) -> Routing:
        scores = linear(h, weights(self.weight).float()).softmax(-1)
        chosen = scores.topk(self.top_k, dim=-1)
        return Routing(chosen.indices, chosen.values / chosen.values.sum(-1, keepdim=True), scores)


def attention(prefix: str, heads: int) -> DenseBlock:
    q, k, v, o = (f"{prefix}self_attn.{name}_proj.weight" for name in "qkvo")
    norm = f"{prefix}input_layernorm.weight"

    def normed(weights: Weights, x: Tensor) -> tuple[Tensor]:
        return (rms_norm(x.flatten(0, 1), weights(norm), EPS),)

    def contexts(weights: Weights, x: Tensor) -> tuple[Tensor]:
        (h,) = normed(weights, x)
        parts = (linear(h, weights(name)).view(*x.shape[:2], heads, -1).transpose(1, 2) for name in (q, k, v))
        return (scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).reshape(len(h), -1),)

    first = InputGroup((q, k, v), NormWeight(norm, (q, k, v)))
    return DenseBlock("attention", (Stage((first,), normed), Stage((InputGroup((o,), LinearRows(v, (o,))),), contexts)))


SIZES = {"layers": 2, "hidden": 128, "vocab_size": 512, "heads": 4, "experts": 4, "width": 128}
CONFIG: dict[str, Any] = {"architectures": ["ToyForCausalLM"], **SIZES}
INT8 = {"scheme": {"kind": "int", "bits": 8, "group_size": 64}, "method": {"kind": "rtn"}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(quantkit.arch.ARCHS, "ToyForCausalLM", Toy)
    path = tmp_path / "toy"
    write_shards(path, random_weights(CONFIG))
    (path / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(path)
    write_text(tmp_path / "calibration.txt")
    return path


@pytest.mark.parametrize("kind", ["rtn", "gptq"])
def test_it_is_converted(folder: Path, kind: str) -> None:
    out = folder.parent / "out"
    rules = [{"match": "role:attention", **INT8}, int4("role:expert", kind)]
    run(folder, recipe_of(*rules, tokens=256 if kind == "gptq" else None), out)
    source = {name: tensor.float() for name, tensor in random_weights(CONFIG).items()}
    with FolderSource(out, COMPRESSED_TENSORS.reader) as written:
        found = {name: written.read(name).float() for name in written.infos()}
    assert found.keys() == source.keys()
    for spec in Toy(CONFIG).tensors():
        error = (found[spec.name] - source[spec.name]).norm() / source[spec.name].norm()
        assert (0.001 < error < 0.2) if spec.linear else error == 0, spec.name
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert section["ignore"] == ["lm_head", r"re:.*\.block_sparse_moe\.gate$"]
    targets = [group["targets"] for group in section["config_groups"].values()]
    assert targets == [[r"re:.*\.block_sparse_moe\.experts\.\d+\.(w1|w3|w2)$"], ["Linear"]]


def test_vllm_s_demands_follow_what_it_says(folder: Path) -> None:
    rules = [
        {"match": "*.0.self_attn.k_proj.weight", "keep": "source"},
        {"match": "*.1.*.experts.3.w2.weight", "keep": "source"},
    ]
    with pytest.raises(PlanError) as caught:
        run(folder, recipe_of(*rules, int4(kind="rtn"), tokens=None), folder.parent / "out")
    assert "0.self_attn: q_proj int4 g64, k_proj unquantised, v_proj int4 g64; vLLM joins them into qkv_proj" in str(
        caught.value
    )
    assert "1.block_sparse_moe: experts.0.w1 int4 g64, experts.3.w2 unquantised; all projections" in str(caught.value)


def test_it_fits_gpus_and_its_cache_is_divided(folder: Path) -> None:
    made = forecast(folder, recipe_of(int4(kind="rtn"), tokens=None), gpus=parse_gpus("2xT4-16GB"))
    assert made.fits is not None
    found = made.fits[0].fit
    assert isinstance(found, Fit)
    assert found.placement is not None
    assert (found.placement.tensor_parallel, found.placement.context) == (2, 4096)
    assert found.placement.kv_bytes_per_token == 2 * 2 * 128 * 2 // 2
