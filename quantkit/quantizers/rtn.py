"""Round to nearest: the scale of each group is searched, the codes are the nearest ones. Needs no calibration.

With calibration the scale search weights each input by its mean square (the imatrix of llama.cpp).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

ScaleSearch = Literal["range", "mse", "importance"]
"""range: the group's whole range; mse: least squared weight error; importance: that error weighted by each input's mean square."""


class Rtn(BaseModel, frozen=True, extra="forbid"):
    """Options of round to nearest."""

    kind: Literal["rtn"] = "rtn"
    scale_search: ScaleSearch = Field("importance", description="How the scale of a group is chosen.")
    grid: int = Field(40, ge=2, le=200, description="Candidate ranges tried for each group.")
    signed: bool = Field(True, description="Symmetric scales may be negative (the extra level on either side).")
