"""How the numbers are chosen. One method is one file, with its paper on top, and one member of `Method`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from quantkit.quantizers.awq import Awq
from quantkit.quantizers.gptq import Gptq
from quantkit.quantizers.rtn import Rtn

Method = Annotated[Rtn | Gptq | Awq, Field(discriminator="kind")]

__all__ = ["Awq", "Gptq", "Method", "Rtn"]
