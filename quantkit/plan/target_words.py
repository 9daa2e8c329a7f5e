"""The options that stand for an output with a target: ``--fit 5xA100-80GB --sensitivity FOLDER``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from quantkit.errors import RecipeError

FORMATS = ("compressed-tensors", "gguf")
SPLIT_SIZE = "50GB"
"""Largest file of a GGUF output: what model hubs take."""


@dataclass(frozen=True, slots=True)
class TargetWords:
    """Fields are the options' values, as typed. ``fit``: GPUs; ``context``: of the sequence that they must fit;
    ``target_bpw``; ``target_size``; ``format``: of the output, None for compressed-tensors; ``sensitivity``: folder
    of a Fisher pass."""

    fit: str | None = None
    context: int | None = None
    target_bpw: float | None = None
    target_size: str | None = None
    format: str | None = None
    sensitivity: str | None = None

    @property
    def limited(self) -> bool:
        """Whether a size is asked for."""
        return any(value is not None for value in (self.fit, self.target_bpw, self.target_size))

    @property
    def words(self) -> tuple[str, ...]:
        """As words of a command line."""
        given = ((field.name, getattr(self, field.name)) for field in fields(self))
        return tuple(word for name, value in given if value is not None for word in (_option(name), str(value)))

    def output(self) -> dict[str, object]:
        """The output of a recipe that this stands for. Raises `RecipeError` for options that miss others."""
        if not self.limited:
            raise RecipeError(f"found {self.words[0]}, needed --fit, --target-bpw or --target-size with it.")
        if self.sensitivity is None:
            raise RecipeError(
                f"found {self.words[0]}, needed --sensitivity FOLDER with it.",
                hint="`quantkit sensitivity SOURCE -o FOLDER` makes the folder.",
            )
        if self.format not in (None, *FORMATS):
            raise RecipeError(f"--format: found {str(self.format)[:40]!r}, needed {' or '.join(FORMATS)}.")
        output: dict[str, object] = {
            "name": self._name(),
            "format": self.format or FORMATS[0],
            "target": self._target(),
        }
        return {**output, "split_max_size": SPLIT_SIZE} if self.format == "gguf" else output

    def _target(self) -> Mapping[str, object]:
        limits = {"size": self.target_size, "bpw": self.target_bpw, "gpus": self.fit, "context": self.context}
        return {key: value for key, value in limits.items() if value is not None}

    def _name(self) -> str:
        if self.fit is not None:
            return f"for-{self.fit}"
        return f"{self.target_bpw:g}bpw" if self.target_bpw is not None else f"in-{self.target_size}".replace(" ", "")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
