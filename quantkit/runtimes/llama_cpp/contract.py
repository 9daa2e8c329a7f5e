"""What llama.cpp demands of a GGUF file, checked on the plan, before any work.

`problems`: the file cannot be written, would not load, or would be computed wrongly. `notes`: what llama.cpp computes
slightly otherwise than the checkpoint's own code.
"""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.arch.base import GgufModel
from quantkit.errors import ConfigError
from quantkit.formats.gguf import sink
from quantkit.formats.planned import PlannedTensor
from quantkit.tensors import Role

CHOICES = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "Q3_K", "IQ3_S", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
"""Block types to choose among for a size. Rows that are no whole blocks get what `presets.fitting_type` says."""
TABLE_TYPE, UNSEEN_TYPE = "Q6_K", "Q8_0"
"""Of vocabulary matrices, as most presets store them, and of linears of which no sensitivity is known."""


def problems(planned: Sequence[PlannedTensor], model: GgufModel, n_mtp: int) -> list[str]:
    """One line for each; [] if there is none. ``n_mtp``: tensors that the model's MTP layers have as GGUF stores
    them."""
    lines = sink.problems(planned, model.stored_name)
    stored = sum(tensor.role is Role.MTP for tensor in planned)
    try:
        model.key_values(mtp=stored > 0)
    except ConfigError as error:
        lines.append(f"{error.message} {error.hint}".rstrip())
    if 0 < stored < n_mtp:
        lines.append(f"the MTP layer lacks {n_mtp - stored} of its tensors: keep all of them, or drop all.")
    return lines


def notes(planned: Sequence[PlannedTensor], model: GgufModel) -> list[str]:
    """One line for each difference."""
    return list(model.differences(mtp=any(tensor.role is Role.MTP for tensor in planned)))
