"""How the numbers are chosen. One method is one file, with its paper on top, and one member of `Method`; `repack`,
which chooses none, stands beside them."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from quantkit.quantizers.awq import Awq
from quantkit.quantizers.gptq import Gptq
from quantkit.quantizers.repack import Repack
from quantkit.quantizers.rtn import Rtn

_Choosing: TypeAlias = Rtn | Gptq | Awq
Method = Annotated[_Choosing, Field(discriminator="kind")]
"""Methods that choose codes."""
AskedMethod = Annotated[_Choosing | Repack, Field(discriminator="kind")]
"""What a recipe may ask for."""

__all__ = ["AskedMethod", "Awq", "Gptq", "Method", "Repack", "Rtn"]
