"""A DeepSeek V3 as llama.cpp sees it, bound to one config: what is written, and what is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from quantkit.arch.base import GgufReading, ModelArch
from quantkit.arch.deepseek_v3_config import DeepseekV3Config
from quantkit.arch.deepseek_v3_gguf import GGUF_ARCHITECTURE, differences, key_values, server_flags, stored_name
from quantkit.arch.deepseek_v3_gguf_read import Gating, read_as_llama_cpp
from quantkit.arch.parts import in_parts
from quantkit.arch.rope import LinearScaling


@dataclass(frozen=True, slots=True)
class DeepseekV3Gguf:
    """A `GgufModel`. ``arch_of``: config.json, the gating of its routers, linear scaling of positions -> the model."""

    config: DeepseekV3Config
    arch_of: Callable[[Mapping[str, object], Gating, LinearScaling | None], ModelArch]

    def stored_name(self, name: str) -> tuple[str, int | None]:
        """See `stored_name`."""
        return stored_name(name)

    def key_values(self, *, mtp: bool) -> dict[str, int | float | bool | str]:
        """See `key_values`."""
        return key_values(self.config, mtp=mtp)

    def read(self, found: Callable[[str], object]) -> GgufReading:
        """See `read_as_llama_cpp`."""
        model = read_as_llama_cpp(self.config, lambda key: found(f"{GGUF_ARCHITECTURE}.{key}"))
        arch = self.arch_of(model.config.model_dump(), model.gating, model.scaling)
        return GgufReading(arch, tuple(arch.tensors()) if model.whole_kv_b else in_parts(arch), model.notes)

    def differences(self) -> tuple[str, ...]:
        """See `differences`."""
        return differences(self.config)

    def server_flags(self) -> tuple[str, ...]:
        """See `server_flags`."""
        return server_flags(self.config)
