"""The family ``deepseek_v32``: DeepSeek V3.2, V3.2-Exp and Speciale. DeepSeek V3 with an indexer in each attention.

vLLM fuses the indexer's wk and weights_proj into a module that it never quantises, so they are no linears here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from quantkit.arch.base import CheckpointVariants, DenseBlock, GgufModel, ServingSizes
from quantkit.arch.deepseek_v3 import DeepseekV3
from quantkit.arch.deepseek_v3_config import SIGMOID_ROUTING, DeepseekConfig
from quantkit.arch.deepseek_v32_config import DeepseekV32Config
from quantkit.arch.rope import LinearScaling
from quantkit.tensors import Projection, Role, TensorSpec

if TYPE_CHECKING:
    from quantkit.arch.deepseek_v3_gguf import Dialect
    from quantkit.arch.indexer import Indexer


class DeepseekV32(DeepseekV3):
    """A `ModelArch`."""

    interleaved_index: bool = False
    """Which pairs of the indexer's dimensions are rotated together."""

    @staticmethod
    def _checked(config: Mapping[str, object]) -> DeepseekConfig:
        return DeepseekV32Config.of({**SIGMOID_ROUTING, **config})

    def _bind(self, config: DeepseekConfig, scaling: LinearScaling | None = None) -> None:
        super()._bind(config, scaling)
        all_full = all(map(self.sparse.has_indexer, range(self.n_layers)))
        self.longest_exact: int | None = None if all_full else self.sparse.index_topk

    @property
    def sparse(self) -> DeepseekV32Config:
        """The config, with the indexer's entries."""
        assert isinstance(self.config, DeepseekV32Config)
        return self.config

    def variants(self) -> CheckpointVariants:
        """DeepSeek V3's: the indexer's tensors are no strangers here."""
        return replace(super().variants(), foreign={})

    def gguf(self) -> GgufModel:
        """``deepseek2`` of llama.cpp with indexers, which is an architecture of its own."""
        from quantkit.arch.deepseek_v3_gguf_model import DeepseekV3Gguf

        return DeepseekV3Gguf(self.config, self.computing, self._root, self._dialect())

    def _dialect(self) -> Dialect:
        from quantkit.arch.deepseek_v32_gguf import deepseek32

        return deepseek32(self.sparse)

    def serving(self) -> ServingSizes:
        """DeepSeek V3's; the indexer's keys are cached too, in llama.cpp in 16 bits, in vLLM in 8."""
        sizes = super().serving()
        cached = sizes.kv_bytes_per_token + 2 * self.sparse.index_head_dim
        return replace(sizes, kv_bytes_per_token=cached, sparse_top_k=self.sparse.index_topk)

    def _indexer(self) -> Indexer:
        from quantkit.arch.indexer import Indexer

        c = self.sparse
        return Indexer(c.index_n_heads, c.index_head_dim, c.index_topk, self.interleaved_index)

    def _attention(self, layer: int) -> DenseBlock:
        from quantkit.arch import mla

        indexer = self._indexer() if self.sparse.has_indexer(layer) else None
        return mla.attention_block(self._prefix(layer), replace(self._attention_shape(), indexer=indexer))

    def _attention_tensors(self, layer: int, prefix: str) -> Iterator[TensorSpec]:
        yield from super()._attention_tensors(layer, prefix)
        if self.sparse.has_indexer(layer):
            yield from self._indexer_tensors(layer, f"{prefix}indexer.")

    def _indexer_tensors(self, layer: int, prefix: str) -> Iterator[TensorSpec]:
        c = self.sparse
        queries = (c.index_n_heads * c.index_head_dim, c.q_lora_rank)
        yield TensorSpec(
            f"{prefix}wq_b.weight",
            queries,
            Role.ATTENTION,
            layer,
            projection=Projection.INDEX_Q,
            linear=True,
            replicated=True,
        )
        yield TensorSpec(f"{prefix}wk.weight", (c.index_head_dim, c.hidden_size), Role.ROUTER, layer)
        yield TensorSpec(f"{prefix}k_norm.weight", (c.index_head_dim,), Role.NORM, layer)
        yield TensorSpec(f"{prefix}k_norm.bias", (c.index_head_dim,), Role.NORM, layer)
        yield TensorSpec(f"{prefix}weights_proj.weight", (c.index_n_heads, c.hidden_size), Role.ROUTER, layer)
