"""quantkit: quantise Mixture-of-Experts checkpoints far larger than memory, layer by layer, expert by expert.

    from quantkit import Recipe, convert, evaluate, inspect, plan

The functions do what the commands of the same names do, with the same options: see `quantkit docs library`. Importing
the package costs milliseconds: classes come when they are asked for, torch when work begins.
"""

# ruff: noqa: E402 - the first call comes before the imports that take the time

from __future__ import annotations

# isort: off
from quantkit.interrupts import quiet_while_loading

quiet_while_loading()
# isort: on

from importlib import import_module
from typing import TYPE_CHECKING

# Packages that bear the names of functions are loaded first: Python puts a package into its parent when it is loaded,
# and would put these into the functions' places later.
import quantkit.convert  # noqa: F401  # pyright: ignore[reportUnusedImport]
import quantkit.evaluate  # noqa: F401  # pyright: ignore[reportUnusedImport]
import quantkit.inspect  # noqa: F401  # pyright: ignore[reportUnusedImport]
import quantkit.plan  # noqa: F401  # pyright: ignore[reportUnusedImport]
import quantkit.report  # noqa: F401  # pyright: ignore[reportUnusedImport]
import quantkit.sensitivity  # noqa: F401  # pyright: ignore[reportUnusedImport]
import quantkit.text  # noqa: F401  # pyright: ignore[reportUnusedImport]
import quantkit.verify  # noqa: F401  # pyright: ignore[reportUnusedImport]
from quantkit.api import (
    build_calibration,
    convert,
    evaluate,
    inspect,
    plan,
    report,
    trial,
    verify,
)
from quantkit.errors import QuantkitError
from quantkit.fisher import sensitivity
from quantkit.gate import check, update_baseline
from quantkit.making_recipes import choose_types, recipe_for
from quantkit.text.result import document, text
from quantkit.version import __version__

if TYPE_CHECKING:
    from quantkit.convert.events import Event, Report
    from quantkit.documents.calibration_set import CalibrationSet
    from quantkit.documents.evaluation import Evaluation
    from quantkit.documents.sensitivity import SensitivityDocument
    from quantkit.evaluate.check.verdict import Limits, Verdict
    from quantkit.evaluate.events import EvaluationEvent
    from quantkit.inspect.folder import Inspection
    from quantkit.inspect.gguf import GgufInspection
    from quantkit.inspect.imatrix import ImatrixInspection
    from quantkit.plan.forecast import Forecast
    from quantkit.plan.plan import Plan
    from quantkit.plan.recipe import Recipe
    from quantkit.text.progress import progress
    from quantkit.verify.verification import Verification

__all__ = [
    "CalibrationSet",
    "Evaluation",
    "EvaluationEvent",
    "Event",
    "Forecast",
    "GgufInspection",
    "ImatrixInspection",
    "Inspection",
    "Limits",
    "Plan",
    "QuantkitError",
    "Recipe",
    "Report",
    "SensitivityDocument",
    "Verdict",
    "Verification",
    "__version__",
    "build_calibration",
    "check",
    "choose_types",
    "convert",
    "document",
    "evaluate",
    "inspect",
    "plan",
    "progress",
    "recipe_for",
    "report",
    "sensitivity",
    "text",
    "trial",
    "update_baseline",
    "verify",
]

_MODULES = {
    "CalibrationSet": "documents.calibration_set",
    "Evaluation": "documents.evaluation",
    "EvaluationEvent": "evaluate.events",
    "Event": "convert.events",
    "Forecast": "plan.forecast",
    "GgufInspection": "inspect.gguf",
    "ImatrixInspection": "inspect.imatrix",
    "Inspection": "inspect.folder",
    "Limits": "evaluate.check.verdict",
    "Plan": "plan.plan",
    "Recipe": "plan.recipe",
    "Report": "convert.events",
    "SensitivityDocument": "documents.sensitivity",
    "Verdict": "evaluate.check.verdict",
    "Verification": "verify.verification",
    "progress": "text.progress",
}
"""Where the names are that cost time to import."""


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
