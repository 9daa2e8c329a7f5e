"""GPTQ (arXiv 2210.17323) as LDLQ, with the additions that improved a trained Mixture-of-Experts model:

scales searched under diag(H) and signed; columns by falling diag(H) on static groups (nothing is permuted in the file);
targets that follow the unquantised stream (`cross`); and coordinate descent over scales and codes after the sweep.
The numerics are in `quantkit.quantizers.ldlq.factor`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field

from quantkit.quantizers.rtn import ScaleSearch, grid_points, weighting

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.calibrate.inputs import Inputs
    from quantkit.quantizers.batch import QuantizedBatch, QuantizedRows, Quantizer
    from quantkit.quantizers.ldlq.factor import Factor
    from quantkit.quantizers.ldlq.polish import Polished
    from quantkit.quantizers.ldlq.two_sided import OutputFactor
    from quantkit.schemes import ChosenScheme
    from quantkit.schemes.grid import Grid, Stored


@dataclass(frozen=True, slots=True)
class PreparedInputs:
    """One factor for all linears that the same tokens feed. ``unseen``: of each matrix of the batch, whether no token
    fed it."""

    factor: Factor
    cross: Tensor | None
    unseen: tuple[bool, ...]
    in_storage_order: Callable[[], Factor]
    """The factor for codebooks, made when first asked for."""

    @property
    def importance(self) -> Tensor:
        """(B, in): diagonal of the damped Hessian. The damping lets inputs that never fired count a little."""
        return self.factor.hessian.diagonal(dim1=-2, dim2=-1)

    def fallbacks(self, scheme: ChosenScheme) -> tuple[str, ...]:
        """What `QuantError` says of each matrix in this scheme."""
        factor = self.factor if scheme.has_grid else self.in_storage_order()
        damped = "" if factor.damping == 1 else f"damp_percent taken {factor.damping:g} times"
        return tuple("no calibration tokens: round to nearest" if blind else damped for blind in self.unseen)


class Gptq(BaseModel, frozen=True, extra="forbid"):
    """Options of GPTQ. Each addition can be switched off in a recipe."""

    kind: Literal["gptq"] = "gptq"
    damp_percent: float = Field(0.01, gt=0, le=1, description="Fraction of mean(diag H) added to the diagonal.")
    act_order: Literal["none", "static"] = Field(
        "static", description="Columns by falling diag(H); storage keeps its order."
    )
    scale_search: ScaleSearch = Field("importance", description="How the scale of a group is chosen.")
    grid: int = Field(40, ge=2, le=200, description="Candidate ranges tried for each group.")
    signed: bool = Field(True, description="Symmetric scales may be negative (the extra level on either side).")
    polish: int = Field(
        2, ge=0, le=16, description="Rounds of coordinate descent over scales and codes after the sweep."
    )
    cross: float = Field(0.5, ge=0, le=1, description="How far targets follow the unquantised stream (0: plain GPTQ).")
    shrink: float = Field(
        3.0,
        ge=0,
        description="Shrinkage of an expert's gate/up Hessian to the layer's, in tokens per input feature.",
    )
    down_shrink: float = Field(
        1.0,
        ge=0,
        description="Shrinkage of an expert's down Hessian to its diagonal, in tokens per input feature.",
    )

    output_aware: bool = Field(
        False,
        description="Errors are also weighed by what they do to the model's loss, with the gradients of `quantkit "
        "sensitivity`, which the recipe names.",
    )

    row_gains: bool = Field(
        False,
        description="Rows of linears that add to the residual stream (o, down) get gains by least squares of their "
        "outputs, folded into the stored scales (towards the unquantised stream, if cross is not 0). Only integers and "
        "block types of ggml take them, but for MXFP4.",
    )

    @property
    def needs_inputs(self) -> bool:
        """Whether the method can't work without calibration inputs."""
        return True

    @property
    def needs_hessian(self) -> bool:
        """Whether the method takes whole second moments of the inputs."""
        return True

    @property
    def follows_original(self) -> bool:
        """Whether the method wants the unquantised stream beside the quantised one."""
        return self.cross > 0

    @property
    def shrinkage(self) -> tuple[float, float]:
        """Strengths of `inputs.shrunk` for an expert's gate and up, and of `inputs.shrunk_to_diagonal` for its down."""
        return self.shrink, self.down_shrink

    def quantizer(self, stats: Inputs | None) -> Quantizer:
        """`quantize` for linears that these inputs feed, prepared once for all of them. Overwrites ``stats``."""
        return partial(self.quantize, prepared=self.prepare(stats))

    def prepare(self, stats: Inputs | None) -> PreparedInputs:
        """Factor the Hessians once for all linears of the group. Overwrites ``stats``.

        Raises `CalibrationError` if a Hessian is not finite.
        """
        import torch

        from quantkit.calibrate.inputs import InputStats
        from quantkit.quantizers.ldlq import factor as ldlq_factor

        assert isinstance(stats, InputStats), "the plan admits gptq with calibration only"
        unseen = stats.hessian.diagonal(dim1=-2, dim2=-1).sum(-1) == 0
        if unseen.any():  # no token, or none that did anything: all inputs count alike
            stats.hessian[unseen] += torch.eye(stats.hessian.shape[-1], device=stats.hessian.device)
        factor = ldlq_factor.factorize(stats.hessian, self.damp_percent, act_order=self.act_order == "static")
        anew = cache(partial(ldlq_factor.in_storage_order, factor, self.damp_percent))
        in_storage_order = anew if self.act_order == "static" else lambda: factor
        return PreparedInputs(factor, stats.cross if self.cross else None, tuple(unseen.tolist()), in_storage_order)

    def quantize(
        self,
        weight: Tensor,
        scheme: ChosenScheme,
        prepared: PreparedInputs,
        reach: Tensor | None = None,
        output_factor: OutputFactor | None = None,
        to_residual: bool = False,
    ) -> QuantizedBatch:
        """weight (B, out, in) float32 -> codes and scales. Without an output Hessian rows are independent and go
        through a slice at a time."""
        from quantkit.quantizers.batch import QuantizedBatch, in_slices
        from quantkit.quantizers.row_gains import takes_row_gains

        if output_factor is not None:
            made = self._two_sided(weight, scheme, prepared, reach, output_factor)
        else:
            parts = [self._quantize_rows(part, scheme, prepared, reach) for part in in_slices(weight)]
            made = QuantizedBatch.of(scheme, parts, prepared.fallbacks(scheme))
        if self.row_gains and to_residual and takes_row_gains(scheme):
            return self._gained(made, weight, prepared)
        return made

    def _gained(self, made: QuantizedBatch, weight: Tensor, prepared: PreparedInputs) -> QuantizedBatch:
        """With gains of rows in its scales; the loss is that of the new weights. An ``output_loss`` is that before."""
        from quantkit.quantizers.batch import QuantizedBatch, in_slices

        parts: list[QuantizedRows] = []
        start = 0
        for part in in_slices(weight):
            stop = start + part.shape[1]
            parts.append(self._gained_rows(made.rows(start, stop), part, prepared))
            start = stop
        changed = QuantizedBatch.of(made.scheme, parts, made.fallbacks)
        return replace(made, stored=changed.stored, loss=changed.loss)

    def _gained_rows(self, made: QuantizedBatch, weight: Tensor, prepared: PreparedInputs) -> QuantizedRows:
        from quantkit.quantizers.batch import QuantizedRows
        from quantkit.quantizers.ldlq.factor import row_loss
        from quantkit.quantizers.row_gains import gained, row_gains

        hessian = prepared.factor.hessian
        gains = row_gains(weight, made.decode(), hessian, prepared.cross)
        stored = gained(made.scheme, made.stored, gains)
        error = self._target(weight, prepared) - made.scheme.decode(**stored)
        return QuantizedRows(stored, row_loss(error, hessian), made.norm)

    def _two_sided(
        self,
        weight: Tensor,
        scheme: ChosenScheme,
        prepared: PreparedInputs,
        reach: Tensor | None,
        output_factor: OutputFactor,
    ) -> QuantizedBatch:
        from quantkit.kernels.recorded import Recorded
        from quantkit.quantizers.batch import QuantizedBatch
        from quantkit.quantizers.ldlq import factor as ldlq_factor
        from quantkit.quantizers.ldlq import two_sided

        if reach is None and scheme.shares_scale:
            reach = weight.abs().amax((-2, -1))  # of the whole matrix, not of the rows at hand
        hessian, descend = prepared.factor.hessian, Recorded(partial(self._descended, prepared.factor))
        rounded = two_sided.round_rows(
            self._target(weight, prepared),
            output_factor,
            lambda rows: self._rounded(rows, scheme, prepared, reach, descend)[0],
            lambda stored: scheme.decode(**stored),
        )
        loss, norm = (ldlq_factor.row_loss(one, hessian) for one in (rounded.error, weight))
        output_loss = two_sided.output_losses(rounded, output_factor, hessian)
        output_norm = norm * output_factor.diagonal.flatten(1, 2)
        return QuantizedBatch(scheme, rounded.stored, loss, norm, prepared.fallbacks(scheme), output_loss, output_norm)

    def _target(self, weight: Tensor, prepared: PreparedInputs) -> Tensor:
        """What the codes are to come near to: the weight, moved towards the unquantised stream."""
        from quantkit.quantizers.ldlq import factor as ldlq_factor

        if prepared.cross is None:
            return weight
        return ldlq_factor.towards_original(weight, prepared.cross, prepared.factor, self.cross)

    def _quantize_rows(
        self, weight: Tensor, scheme: ChosenScheme, prepared: PreparedInputs, reach: Tensor | None
    ) -> QuantizedRows:
        from quantkit.quantizers.batch import QuantizedRows
        from quantkit.quantizers.ldlq import factor as ldlq_factor

        norm = ldlq_factor.row_loss(weight, prepared.factor.hessian)
        return QuantizedRows(*self._rounded(self._target(weight, prepared), scheme, prepared, reach), norm)

    def _rounded(
        self,
        target: Tensor,
        scheme: ChosenScheme,
        prepared: PreparedInputs,
        reach: Tensor | None,
        descend: Callable[[Grid, Tensor], Polished] | None = None,
    ) -> tuple[Stored, Tensor]:
        """What is stored of some rows (B, rows, in), and tr(E H E^T) of each (B, rows). ``descend``: `_descended`
        already recorded."""
        from quantkit.quantizers.ldlq import factor as ldlq_factor
        from quantkit.quantizers.ldlq import vectors as ldlq_vectors

        factor = prepared.factor
        importance = weighting(prepared.importance, self.scale_search)
        if not scheme.has_grid:
            vectors = scheme.vector_grid(target, importance)
            error = ldlq_vectors.sweep_vectors(vectors, target, prepared.in_storage_order())
            return vectors.stored(), ldlq_factor.row_loss(error, factor.hessian)
        grid = scheme.grid(target, importance, points=grid_points(self), signed=self.signed, reach=reach)
        found = (descend or partial(self._descended, factor))(grid, target)
        return grid.stored(found.codes, found.scale, found.offset), found.loss

    def _descended(self, factor: Factor, grid: Grid, target: Tensor) -> Polished:
        """Codes by the sweep, and after coordinate descent if there is any. A GPU records it: it waits for nothing."""
        from quantkit.quantizers.ldlq import polish as ldlq_polish
        from quantkit.quantizers.ldlq import sweep as ldlq_sweep

        if self.polish:
            codes = ldlq_sweep.sweep(grid, target, factor)
            return ldlq_polish.polish(grid, target, codes, factor.hessian, self.polish)
        loss = target.new_zeros(target.shape[:2])
        codes = ldlq_sweep.sweep(grid, target, factor, loss)
        return ldlq_polish.Polished(codes, grid.scale, grid.offset, loss)
