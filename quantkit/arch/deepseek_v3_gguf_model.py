"""A DeepSeek V3 as llama.cpp sees it, bound to one config: what is written, and what is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from quantkit.arch.base import GgufReading, KeyValue, ModelArch
from quantkit.arch.deepseek_v3_config import DeepseekConfig
from quantkit.arch.deepseek_v3_gguf import DEEPSEEK2, Dialect, differences, key_values, server_flags, stored_name
from quantkit.arch.deepseek_v3_gguf_read import read_as_llama_cpp
from quantkit.arch.parts import in_parts
from quantkit.arch.rope import LinearScaling


@dataclass(frozen=True, slots=True)
class DeepseekV3Gguf:
    """A `GgufModel`. ``computing``: config and linear scaling of positions -> the model as they say; ``root``: of the
    official names; ``dialect``: the architecture's own names and keys."""

    config: DeepseekConfig
    computing: Callable[[DeepseekConfig, LinearScaling | None], ModelArch]
    root: str = ""
    dialect: Dialect = DEEPSEEK2

    @property
    def architecture(self) -> str:
        """The dialect's."""
        return self.dialect.architecture

    def stored_name(self, name: str) -> tuple[str, int | None]:
        """See `stored_name`."""
        return stored_name(name.removeprefix(self.root) if self.root else name, self.dialect)

    def key_values(self, *, mtp: bool) -> dict[str, KeyValue]:
        """See `key_values`."""
        return key_values(self.config, mtp=mtp, dialect=self.dialect)

    def read(self, found: Callable[[str], object]) -> GgufReading:
        """See `read_as_llama_cpp`."""
        prefix = f"{self.dialect.architecture}."
        model = read_as_llama_cpp(self.config, lambda key: found(prefix + key), self.dialect)
        arch = self.computing(model.config, model.scaling)
        return GgufReading(arch, tuple(arch.tensors()) if model.whole_kv_b else in_parts(arch), model.notes)

    def differences(self, *, mtp: bool) -> tuple[str, ...]:
        """See `differences`."""
        return differences(self.config, mtp=mtp, dialect=self.dialect)

    def constants(self) -> Mapping[str, tuple[float, ...]]:
        """None."""
        return {}

    def server_flags(self) -> tuple[str, ...]:
        """See `server_flags`."""
        return server_flags(self.config)
