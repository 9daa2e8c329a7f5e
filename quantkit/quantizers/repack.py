"""Repack: no number is chosen. The source is quantised already, and its codes and scales are taken over as they are.

Int4 in groups of 32 becomes Q4_0, MXFP4 becomes ggml's MXFP4, each with the same numbers in other bytes
(`quantkit.schemes.repacking`). Needs no calibration and no forward pass; what does not fit exactly is refused.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class Repack(BaseModel, frozen=True, extra="forbid"):
    """Take the codes and scales of a source that is quantised already; the scheme must hold them exactly."""

    kind: Literal["repack"] = "repack"

    @property
    def output_aware(self) -> bool:
        """Whether the method takes output Hessians."""
        return False

    @property
    def needs_inputs(self) -> bool:
        """Whether the method can't work without calibration inputs."""
        return False
