"""AWQ (arXiv 2306.00978): input channels are rescaled before codes are chosen, so that those that matter lie on a finer
part of the grid. What makes the inputs absorbs the factors (`quantkit.quantizers.rescaling`).

    factor_j = x_j^a / w_j^b        x_j: root mean square of input j; w_j: size of column j in all linears that read it

The paper has b = 0 and a from 0 to 1, AutoAWQ b = 1 - a; here both are searched. With a scale search that knows the
inputs' importance little is left for x, and more is gained by columns of even size: a is mostly .04 to .16, b .6 to 1.
The loss of a pair is that of round to nearest on the tokens of each linear, with the diagonal of the Hessian only: an
expert's inputs are 28 kB in place of 205 MB (DeepSeek V3), and the whole Hessian chooses hardly better pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, cast

from pydantic import BaseModel, Field, field_validator
from pydantic.config import JsonDict, JsonValue
from pydantic_core import PydanticCustomError

from quantkit.quantizers.gptq import Gptq
from quantkit.quantizers.rtn import Rtn, floored, grid_points, weighting

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.calibrate.inputs import Inputs
    from quantkit.quantizers.batch import Quantizer
    from quantkit.quantizers.rescaling import ChannelReader, Channels

_SMALLEST_COLUMN = 1e-8
"""Share of the mean fourth power that a column has at least: a hundredth of the mean size."""


def _with_names(schema: JsonDict) -> None:
    """Tell editors that a method may be its name."""
    cast("list[JsonValue]", schema["oneOf"]).insert(0, {"enum": ["rtn", "gptq"]})


class Awq(BaseModel, frozen=True, extra="forbid"):
    """Options of AWQ."""

    kind: Literal["awq"] = "awq"
    grid: int = Field(
        6,
        ge=2,
        le=20,
        description="Exponents from 0 to 1 that are tried for the inputs, and as many for the columns: all pairs.",
    )
    then: Annotated[Rtn | Gptq, Field(discriminator="kind")] = Field(
        Rtn.model_validate({}),
        description="How the codes of the rescaled weights are chosen: a method, or rtn or gptq with its defaults. Its "
        "scale search is that of the losses that are compared.",
        json_schema_extra=_with_names,
    )

    @field_validator("then", mode="before")
    @classmethod
    def _by_name(cls, value: object) -> object:
        return {"kind": value} if isinstance(value, str) else value

    @field_validator("then")
    @classmethod
    def _knows_no_outputs(cls, then: Rtn | Gptq) -> Rtn | Gptq:
        if then.output_aware:
            raise PydanticCustomError("recipe", "found output_aware after awq, needed gptq as the method itself")
        return then

    @property
    def needs_inputs(self) -> bool:
        """Whether the method can't work without calibration inputs."""
        return True

    @property
    def needs_hessian(self) -> bool:
        """Whether the method takes whole second moments of the inputs: the search for factors takes their diagonal."""
        return self.then.needs_hessian

    @property
    def follows_original(self) -> bool:
        """Whether the method wants the unquantised stream beside the quantised one."""
        return self.then.follows_original

    @property
    def output_aware(self) -> bool:
        """Never: output Hessians are those of unfolded rows."""
        return False

    @property
    def row_gains(self) -> bool:
        """Whether ``then`` gives rows gains."""
        return self.then.row_gains

    @property
    def shrinkage(self) -> tuple[float, float]:
        """See `Gptq.shrinkage`."""
        return self.then.shrinkage

    def quantizer(self, stats: Inputs | None) -> Quantizer:
        """That of ``then``, for linears and inputs that are rescaled already. Overwrites ``stats``."""
        return self.then.quantizer(stats)

    def rescale(self, channels: Channels) -> Tensor:
        """Factors (B, n) float32 with the least loss, for each of the B producers; 1 where nothing is better."""
        import torch

        inputs = floored(channels.inputs.importance).sqrt()
        candidates = self._candidates(inputs, _column_sizes(channels))
        losses = candidates.new_zeros(candidates.shape[:2])
        for reader in channels.readers():
            found = torch.stack([self._loss(reader, factors) for factors in candidates])
            losses += found if len(inputs) > 1 else found.sum(1, keepdim=True)
        return candidates[losses.argmin(0), torch.arange(len(inputs), device=losses.device)]

    def _candidates(self, inputs: Tensor, columns: Tensor) -> Tensor:
        """inputs, columns (B, n) -> factors (pairs, B, n), the first all 1; centred, so that nothing grows or shrinks
        much."""
        import torch

        steps = [step / (self.grid - 1) for step in range(self.grid)]
        # Small exponents of the inputs are the likely ones: they are tried more closely.
        factors = torch.stack([inputs ** (a * a) / columns**b for a in steps for b in steps])
        return factors / (factors.amax(-1, keepdim=True) * factors.amin(-1, keepdim=True)).sqrt()

    def _loss(self, reader: ChannelReader, factors: Tensor) -> Tensor:
        """(M,) float32: squared error of the outputs of each linear over its tokens, its weights rounded after they
        were multiplied with ``factors`` (M, n) or (1, n)."""
        from quantkit.quantizers.batch import in_slices

        importance = reader.inputs.importance
        weighed, rescaled = floored(importance), floored(importance / factors.square())
        search = weighting(rescaled, self.then.scale_search)
        columns = factors.unsqueeze(-2)
        loss = weighed.new_zeros(len(reader.weight))
        for rows in in_slices(reader.weight):
            scaled = rows * columns
            stored = reader.scheme.rounded(scaled, search, points=grid_points(self.then), signed=self.then.signed)
            error = reader.scheme.decode(**stored).sub_(scaled).div_(columns)
            loss += error.square_().mul_(weighed.unsqueeze(-2)).sum((-2, -1))
        return loss * reader.tokens


def _column_sizes(channels: Channels) -> Tensor:
    """(B, n) float32: of each column the fourth root of the mean fourth power over all that read it, by tokens. That
    is between mean and largest: a group's scale follows its largest weights."""
    sums = channels.inputs.importance.new_zeros(channels.inputs.importance.shape)
    for reader in channels.readers():
        powers = reader.weight.float().square().square_().sum(-2) * reader.tokens.unsqueeze(-1)
        sums += powers if len(sums) > 1 else powers.sum(0, keepdim=True)
    least = (_SMALLEST_COLUMN * sums.mean(-1, keepdim=True)).clamp_min(1e-30)
    return (sums + least) ** 0.25
