"""Rotary position embedding as a config states it: plain numbers, no torch. `ops.rope_rotation` turns them into angles.

Yarn (arXiv 2309.00071) stretches the slow frequencies by ``factor`` and leaves the fast ones; DeepSeek adds ``mscale``
and ``mscale_all_dim``, which scale the rotated parts and the softmax.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt


class Yarn(BaseModel):
    """The ``rope_scaling`` entry of config.json with type yarn. Defaults are those of the transformers library."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)

    type: Literal["yarn"]
    factor: Annotated[float, Field(ge=1)]
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    original_max_position_embeddings: PositiveInt | None = None
    attention_factor: PositiveFloat | None = None
    truncate: bool = True
    partial_rotary_factor: Literal[1] | None = None


class Llama3(BaseModel):
    """The ``rope_scaling`` entry of Llama 3.1 and later: frequencies that turn fewer than ``low_freq_factor`` times
    within the original context are divided by ``factor``, those that turn more than ``high_freq_factor`` times stay."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)

    type: Literal["llama3"]
    factor: Annotated[float, Field(ge=1)]
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_max_position_embeddings: PositiveInt

    def divisors(self, dim: int, theta: float) -> tuple[float, ...]:
        """What each of the dim / 2 frequencies is divided by."""
        turns = (self.original_max_position_embeddings / (2 * math.pi * theta ** (i / dim)) for i in range(0, dim, 2))
        between = self.high_freq_factor - self.low_freq_factor
        kept = (min(1.0, max(0.0, (turn - self.low_freq_factor) / between)) for turn in turns)
        return tuple(1 / ((1 - keep) / self.factor + keep) for keep in kept)


class Linear(BaseModel):
    """The ``rope_scaling`` entry with type linear: every frequency is divided by ``factor``."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)

    type: Literal["linear"]
    factor: Annotated[float, Field(ge=1)]


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Every frequency divided by ``factor``, as llama.cpp does too where a file does not name the type of scaling.
    ``softmax_factor``: what the softmax scale is multiplied with."""

    factor: float
    softmax_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotates ``dim`` dimensions of a head, base ``theta``; pairs are (0, 1), (2, 3)... or (i, i + dim/2). Scaled by
    ``yarn``, by ``linear``, by ``llama3``, or not at all."""

    dim: int
    theta: float
    interleaved: bool
    max_positions: int
    yarn: Yarn | None = None
    linear: LinearScaling | None = None
    llama3: Llama3 | None = None

    @property
    def attention_factor(self) -> float:
        """What sine and cosine are multiplied with."""
        if self.yarn is None:
            return 1.0
        if self.yarn.attention_factor is not None:
            return self.yarn.attention_factor
        if self.yarn.mscale and self.yarn.mscale_all_dim:
            return _mscale(self.yarn.factor, self.yarn.mscale) / _mscale(self.yarn.factor, self.yarn.mscale_all_dim)
        return _mscale(self.yarn.factor, 1.0)

    @property
    def softmax_factor(self) -> float:
        """What the softmax scale ``1 / sqrt(head_dim)`` is multiplied with (DeepSeek: mscale squared)."""
        if self.linear is not None:
            return self.linear.softmax_factor
        if self.yarn is None or not self.yarn.mscale_all_dim:
            return 1.0
        return _mscale(self.yarn.factor, self.yarn.mscale_all_dim) ** 2

    def yarn_ramp(self, yarn: Yarn) -> tuple[float, float]:
        """Between these indices of the frequency list yarn fades from the original to the stretched frequency."""
        low = self._index_of(yarn.beta_fast, yarn)
        high = self._index_of(yarn.beta_slow, yarn)
        if yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        return (low, high) if low != high else (low, high + 0.001)

    def _index_of(self, rotations: float, yarn: Yarn) -> float:
        """Index of the frequency that turns ``rotations`` times within the original context."""
        context = yarn.original_max_position_embeddings or self.max_positions
        return self.dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))


def rope_entries(config: Mapping[str, object]) -> dict[str, object]:
    """``rope_theta`` and ``rope_scaling`` as the official release spells them; transformers 5 has ``rope_parameters``.

    The entries are not checked here. A scaling of type "default" is none at all.
    """
    scaling = config.get("rope_scaling")
    theta = config.get("rope_theta")
    if scaling is None:
        scaling = config.get("rope_parameters")
    if isinstance(scaling, Mapping):
        values: dict[str, Any] = dict(cast("Mapping[str, Any]", scaling))
        values["type"] = values.get("rope_type") or values.get("type") or "default"
        theta = values.get("rope_theta", theta)
        scaling = None if values["type"] == "default" else values
    return {"rope_scaling": scaling} if theta is None else {"rope_scaling": scaling, "rope_theta": theta}


def _mscale(factor: float, mscale: float) -> float:
    """Yarn's attention temperature, 0.1 ln(factor) + 1, with DeepSeek's multiplier."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
