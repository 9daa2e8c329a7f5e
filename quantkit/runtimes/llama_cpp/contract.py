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
