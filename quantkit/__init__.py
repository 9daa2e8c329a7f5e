"""quantkit: quantise Mixture-of-Experts checkpoints far larger than memory, layer by layer, expert by expert.

    from quantkit import Recipe, convert, evaluate, inspect, plan

The functions do what the commands of the same names do, with the same options: see docs/library.md. Importing the
package costs milliseconds: classes come when they are asked for, torch when work begins.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

# Packages that bear the names of functions are loaded first: Python puts a package into its parent when it is loaded,
# and would put these into the functions' places later.
import quantkit.evaluate  # noqa: F401  # pyright: ignore[reportUnusedImport]
import quantkit.report  # noqa: F401  # pyright: ignore[reportUnusedImport]
from quantkit.errors import QuantkitError
from quantkit.library.commands import check, convert, evaluate, inspect, plan, report, update_baseline
from quantkit.library.shown import document, text
from quantkit.version import __version__

if TYPE_CHECKING:
    from quantkit.evaluate.check_verdict import Limits, Verdict
    from quantkit.evaluate.document import Evaluation
    from quantkit.library.progress import progress
    from quantkit.pipeline.events import EvaluationEvent, Event, Report
    from quantkit.pipeline.forecast import Forecast
    from quantkit.pipeline.inspection import Inspection
    from quantkit.pipeline.inspection_gguf import GgufInspection
    from quantkit.pipeline.inspection_imatrix import ImatrixInspection
    from quantkit.pipeline.plan import Plan
    from quantkit.pipeline.recipe import Recipe

__all__ = [
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
    "Verdict",
    "__version__",
    "check",
    "convert",
    "document",
    "evaluate",
    "inspect",
    "plan",
    "progress",
    "report",
    "text",
    "update_baseline",
]

_MODULES = {
    "Evaluation": "evaluate.document",
    "EvaluationEvent": "pipeline.events",
    "Event": "pipeline.events",
    "Forecast": "pipeline.forecast",
    "GgufInspection": "pipeline.inspection_gguf",
    "ImatrixInspection": "pipeline.inspection_imatrix",
    "Inspection": "pipeline.inspection",
    "Limits": "evaluate.check_verdict",
    "Plan": "pipeline.plan",
    "Recipe": "pipeline.recipe",
    "Report": "pipeline.events",
    "Verdict": "evaluate.check_verdict",
    "progress": "library.progress",
}
"""Where the names are that cost time to import."""


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
