"""The key ``tune`` of a recipe: how whole layers are tuned by gradients after a method has quantised them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, cast

from pydantic import BaseModel, BeforeValidator, Field
from pydantic.config import JsonDict, JsonValue

from quantkit.plan.recipe_values import fault
from quantkit.quantizers import AskedMethod, Awq


class Tune(BaseModel, frozen=True, extra="forbid"):
    """After a layer is quantised: codes, scales and norms of the whole layer, tuned together so that its output comes
    near to the original layer's."""

    epochs: int = Field(8, ge=1, le=256, strict=True, description="How often the calibration rows pass.")
    optimizer: Literal["sign", "adam"] = Field(
        "sign",
        description="What moves codes. sign: the sign of the gradient, no state; adam: 8 more bytes a weight.",
    )
    lr: float = Field(
        1e-3, gt=0, le=0.1, description="Largest step of a code in one update, in distances between levels."
    )
    scale_lr: float = Field(
        1e-3, ge=0, le=0.1, description="Largest relative step of a scale or a norm in one update; 0: they stay."
    )
    alpha: float = Field(
        0.5,
        ge=0,
        le=1,
        description="1: the target is the original layer's output in the unquantised stream; 0: in the quantised one.",
    )
    step_tokens: int = Field(4096, ge=1, strict=True, description="Calibration tokens of an update, in whole rows.")
    seed: int = Field(0, ge=0, lt=2**31, strict=True, description="Of the order of the rows.")

    def check(self, methods: Iterable[AskedMethod | None], calibrated: bool, propagate: str, outputs: int) -> None:
        """Raise the fault of a recipe whose layers cannot be tuned."""
        if not calibrated:
            raise fault("found tune in a data-free recipe, needed calibration")
        if propagate != "quantized":
            raise fault(f"found tune and propagate: {propagate}, needed propagate: quantized")
        if outputs > 1:
            raise fault(f"found tune and {outputs} outputs, needed one: a layer is tuned as one output stores it")
        if any(isinstance(method, Awq) for method in methods):
            raise fault("found tune and awq, which rescales channels, needed gptq or rtn")


def _by_default(value: object) -> object:
    """true: with the defaults; false: not."""
    return ({} if value else None) if isinstance(value, bool) else value


def _or_true(schema: JsonDict) -> None:
    """Tell editors that true and false are allowed, too."""
    cast("list[JsonValue]", schema["anyOf"]).insert(0, {"type": "boolean"})


AskedTune = Annotated[Tune | None, BeforeValidator(_by_default), Field(json_schema_extra=_or_true)]
"""What a recipe may ask for."""
