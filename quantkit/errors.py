"""The exceptions a user can meet. Each carries one line of what was found and needed, and a hint what to do next.

QuantkitError
├── SourceError        a checkpoint on disk is damaged, incomplete or hostile
├── ConfigError        config.json lacks or contradicts something the family needs
├── RecipeError        a recipe file is wrong (names file, line and key)
├── PlanError          source and recipe do not fit together, or the machine is too small
├── SchemeError        a tensor cannot be stored in the scheme asked for
├── CalibrationError   text, tokenizer or hidden states are unusable
├── EvaluationError    an evaluation or a baseline is unusable, or two of them say nothing about each other
├── OutputError        the output folder is taken, locked or full
├── RankLostError      of several processes that do one job, another one failed
└── ValidationError    the finished checkpoint failed its recipe's limits
"""

from __future__ import annotations


class QuantkitError(Exception):
    """Base of everything that a user, a file or a full disk can cause. The command line prints it without a
    traceback."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class SourceError(QuantkitError):
    """A checkpoint on disk is damaged, incomplete or hostile."""


class ConfigError(QuantkitError):
    """config.json lacks or contradicts something that the family needs."""


class RecipeError(QuantkitError):
    """A recipe is wrong; the message names file, line and key."""


class PlanError(QuantkitError):
    """Source and recipe do not fit together, or the machine is too small for the job."""


class SchemeError(QuantkitError):
    """A tensor cannot be stored in the scheme that was asked for."""


class CalibrationError(QuantkitError):
    """Calibration text, tokenizer or hidden states are unusable."""


class EvaluationError(QuantkitError):
    """An evaluation or a baseline is unusable, or two of them say nothing about each other."""


class OutputError(QuantkitError):
    """The output folder is taken, locked, damaged or full."""


class ValidationError(QuantkitError):
    """The finished checkpoint failed the limits of its recipe."""


class RankLostError(QuantkitError):
    """Of several processes that do one job together, another one failed, was killed or is silent."""
