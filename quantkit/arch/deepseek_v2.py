"""The family ``deepseek_v2``: DeepSeek V2, V2-Lite and Coder-V2 (arXiv 2405.04434).

DeepSeek V3's attention and experts. Experts are chosen by the softmax of the router's logits, without a bias, and their
weights are not normalised; V2 looks only into the groups whose best expert is among the best.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from quantkit.arch.deepseek_v3 import DeepseekV3
from quantkit.arch.deepseek_v3_config import DeepseekConfig
from quantkit.tensors import Role, TensorSpec

if TYPE_CHECKING:
    from quantkit.arch.moe import Router


class DeepseekV2Config(DeepseekConfig):
    """Experts are chosen by softmax (arXiv 2405.04434, section 2.2)."""

    routing_hint = 'deepseek_v2 routes with scoring_func "softmax" and topk_method "greedy" or "group_limited_greedy".'

    scoring_func: Literal["softmax"] = "softmax"  # pyright: ignore[reportIncompatibleVariableOverride]
    topk_method: Literal["greedy", "group_limited_greedy"]  # pyright: ignore[reportIncompatibleVariableOverride]
    norm_topk_prob: Literal[False] = False  # pyright: ignore[reportIncompatibleVariableOverride]


class DeepseekV2(DeepseekV3):
    """A `ModelArch`."""

    @staticmethod
    def _checked(config: Mapping[str, object]) -> DeepseekConfig:
        groups = {key: 1 for key in ("n_group", "topk_group") if config.get(key) is None}
        return DeepseekV2Config.of({**config, **groups})

    def _router(self, prefix: str) -> Router:
        from quantkit.arch import moe

        c = self.config
        grouped = c.topk_method == "group_limited_greedy"
        return moe.ScoredRouter(
            weight=f"{prefix}gate.weight",
            gating="softmax",
            normalize=False,
            ranked_by=1,
            n_groups=c.n_group if grouped else 1,
            top_groups=c.topk_group if grouped else 1,
            top_k=c.num_experts_per_tok,
            scale=c.routed_scaling_factor,
        )

    def _router_tensors(self, layer: int, prefix: str) -> Iterator[TensorSpec]:
        shape = (self.config.n_routed_experts, self.hidden_size)
        yield TensorSpec(f"{prefix}gate.weight", shape, Role.ROUTER, layer, by_expert=True)
